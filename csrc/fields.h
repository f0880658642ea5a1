// Walks over the fields of an argument struct by name. ops.h lists them with LDMFAST_FIELDS beside each struct; with
// them bind.cpp fills the struct from a dict, so that there is no position to get wrong.
#pragma once

namespace ldmfast {
template <class Args> struct Fields;  // each(args, visit) calls visit("x", args.x) for every field
}

// The order of the names is free. A name that is no field, one too few, one too many and one twice do not compile: the
// structured binding takes each name once, and as many as Args has fields.
#define LDMFAST_FIELDS(Args, ...)                                                   \
  template <> struct Fields<Args> {                                                 \
    template <class Visit> static constexpr void each(Args& args, Visit&& visit) {  \
      { [[maybe_unused]] auto& [__VA_ARGS__] = args; }                              \
      LDMFAST_EACH(__VA_ARGS__)                                                     \
    }                                                                               \
  };
#define LDMFAST_FIELD(name) visit(#name, args.name);

// LDMFAST_EACH(x, y) is LDMFAST_FIELD(x) LDMFAST_FIELD(y), for up to 64 names: a macro cannot call itself, but what it
// leaves can be expanded again. __VA_OPT__ is C++20, and in GCC and Clang in C++17 as well.
#define LDMFAST_EACH(...) LDMFAST_EXPAND_64(LDMFAST_NEXT(__VA_ARGS__))
#define LDMFAST_NEXT(name, ...) LDMFAST_FIELD(name) __VA_OPT__(LDMFAST_AGAIN LDMFAST_NOTHING (__VA_ARGS__))
#define LDMFAST_AGAIN() LDMFAST_NEXT
#define LDMFAST_NOTHING ()
#define LDMFAST_EXPAND_64(...) LDMFAST_EXPAND_16(LDMFAST_EXPAND_16(LDMFAST_EXPAND_16(LDMFAST_EXPAND_16(__VA_ARGS__))))
#define LDMFAST_EXPAND_16(...) LDMFAST_EXPAND_4(LDMFAST_EXPAND_4(LDMFAST_EXPAND_4(LDMFAST_EXPAND_4(__VA_ARGS__))))
#define LDMFAST_EXPAND_4(...) LDMFAST_EXPAND_1(LDMFAST_EXPAND_1(LDMFAST_EXPAND_1(LDMFAST_EXPAND_1(__VA_ARGS__))))
#define LDMFAST_EXPAND_1(...) __VA_ARGS__

"""The names of the emoji, and the captions that say them."""

from pathlib import Path

# code point -> the name used in captions, then other names for the same thing
OBJECTS = {
    0x1F34E: ("red apple", "apple"),
    0x1F34F: ("green apple",),
    0x1F34C: ("banana",),
    0x1F34B: ("lemon",),
    0x1F34D: ("pineapple",),
    0x1F353: ("strawberry",),
    0x1F352: ("cherries",),
    0x1F349: ("watermelon", "slice of watermelon"),
    0x1F347: ("grapes", "bunch of grapes"),
    0x1F955: ("carrot",),
    0x1F346: ("eggplant", "aubergine"),
    0x1F951: ("avocado",),
    0x1F344: ("mushroom", "toadstool"),
    0x1F354: ("hamburger", "burger"),
    0x1F355: ("pizza", "slice of pizza"),
    0x1F369: ("doughnut", "donut"),
    0x1F366: ("ice cream cone", "ice cream"),
    0x1F9C1: ("cupcake",),
    0x1F382: ("birthday cake", "cake"),
    0x2615: ("cup of coffee", "coffee"),
    0x1F436: ("dog", "puppy"),
    0x1F431: ("cat", "kitten"),
    0x1F981: ("lion",),
    0x1F42F: ("tiger",),
    0x1F43C: ("panda",),
    0x1F438: ("frog",),
    0x1F98A: ("fox",),
    0x1F427: ("penguin",),
    0x1F437: ("pig",),
    0x1F435: ("monkey",),
    0x1F989: ("owl",),
    0x1F419: ("octopus",),
    0x1F980: ("crab",),
    0x1F433: ("whale",),
    0x1F422: ("turtle", "tortoise"),
    0x1F98B: ("butterfly",),
    0x1F41E: ("ladybug", "ladybird"),
    0x1F41D: ("bee",),
    0x1F984: ("unicorn",),
    0x1F33B: ("sunflower",),
    0x1F339: ("rose", "red rose"),
    0x1F335: ("cactus",),
    0x1F384: ("Christmas tree",),
    0x1F697: ("car", "red car"),
    0x1F680: ("rocket",),
    0x2708: ("airplane", "plane"),
    0x26F5: ("sailboat",),
    0x1F6B2: ("bicycle", "bike"),
    0x26BD: ("soccer ball", "football"),
    0x1F3C0: ("basketball",),
    0x1F3B8: ("guitar",),
    0x2614: ("umbrella",),
    0x1F381: ("gift", "present"),
    0x1F451: ("crown",),
    0x1F511: ("key",),
    0x23F0: ("alarm clock", "clock"),
    0x26C4: ("snowman",),
    0x1F383: ("pumpkin", "jack-o-lantern"),
    0x1F388: ("balloon", "red balloon"),
    0x2B50: ("star", "yellow star"),
    0x2764: ("heart", "red heart"),
    0x1F3E0: ("house",),
    0x1F916: ("robot",),
    0x1F9F8: ("teddy bear",),
}

# said without an article although it does not end in s, or with one although it does
UNCOUNTED = set(
    "coffee bacon badminton bowling bread broccoli bubble-tea butter camping canned-food cooked-rice cooking coral fire"
    " garlic green-salad ice-hockey infinity meat-on-bone money-with-wings mount-fuji performing-arts ping-pong popcorn"
    " salt santa-claus shaved-ice soap spaghetti sushi tennis wood yarn bow-and-arrow fork-and-knife".split()
)
SINGULAR = set("abacus bus cactus compass hibiscus hippopotamus lis lotus octopus rhinoceros".split())

CATALOGUES = ("64", "320", "all")

TEMPLATES = (
    "{a} on a {colour} background",
    "{n}, {colour} background",
    "a picture of {a} on a {colour} background",
    "{n} on {colour}",
)


def catalogue(which="64"):
    """{code point: names} of "64" objects, of "all" 600 (those and the rest of emoji_names.txt), or of the "320" that
    stay distinct at a small size: the 64 and those that emoji_320.txt names."""
    if which not in CATALOGUES:
        raise ValueError(f"objects={which!r} is none of {', '.join(CATALOGUES)}")
    if which == "64":
        return OBJECTS
    lines = _lines("emoji_names.txt")
    rest = {int(code, 16): (name,) for code, name in (line.split(" ", 1) for line in lines)}
    if which == "320":
        kept = set(_lines("emoji_320.txt"))
        rest = {code: names for code, names in rest.items() if names[0] in kept}
    return OBJECTS | rest


def _lines(file):
    return Path(__file__).with_name(file).read_text(encoding="utf-8").splitlines()


def with_article(name):
    """ "a red apple", "an owl", "grapes", "broccoli"."""
    stem = file_stem(name)
    last = stem.split("-")[-1]
    if stem in UNCOUNTED or last.endswith("s") and not last.endswith("ss") and last not in SINGULAR:
        return name
    vowel = name[0].lower() in "aeiou" and not name.startswith("unicorn")
    return f"{'an' if vowel else 'a'} {name}"


def captions(names, colour):
    """Every way the collection says `names[0]` on `colour`, the plain one first."""
    phrase = lambda t, n: t.format(a=with_article(n), n=n, colour=colour).replace("a orange", "an orange")  # noqa: E731
    return [phrase(template, name) for name in names for template in TEMPLATES]


def file_stem(name):
    return name.lower().replace(" ", "-")

"""`ldmfast data`: collections of pictures to train on."""

from ldmfast.commands.common import command


def add(commands):
    kinds = commands.add_parser("data", help="build a picture collection to train on")
    kinds = kinds.add_subparsers(title="collections", required=True, metavar="COLLECTION")
    made = command(kinds, "emoji", "Noto emoji on coloured grounds with captions", _data_emoji)
    made.add_argument("output", help="the folder to write")
    made.add_argument("--font", help="the Noto Color Emoji font, if it is not in its usual place")
    made.add_argument("--cutouts", help="a folder of cut-outs to use in place of the font")
    made.add_argument("--objects", choices=("64", "all"), default="64", help="64 objects, or all 600 (default: 64)")
    made.add_argument("--size", type=int, default=64, help="pixels a side (default: 64)")
    made.add_argument("--placements", type=int, default=8, help="pictures of each combination (default: 8)")
    made = command(kinds, "scenes", "scenes of 1 to 3 emoji, with boxes, semantic maps and captions", _data_scenes)
    made.add_argument("output", help="the folder to write")
    made.add_argument("--font", help="the Noto Color Emoji font, if it is not in its usual place")
    made.add_argument("--cutouts", help="a folder of cut-outs to use in place of the font")
    made.add_argument("--size", type=int, default=64, help="pixels a side (default: 64)")
    made.add_argument("--count", type=int, default=6000, help="scenes; one in ten is held out (default: 6000)")
    made.add_argument("--seed", type=int, default=0, help="seed of the arrangements (default: 0)")
    made = command(kinds, "objects", "one or two emoji of 320 in any size and place, with captions", _data_objects)
    made.add_argument("output", help="the folder to write")
    made.add_argument("--font", help="the Noto Color Emoji font, if it is not in its usual place")
    made.add_argument("--cutouts", help="a folder of cut-outs to use in place of the font")
    made.add_argument("--size", type=int, default=128, help="pixels a side (default: 128)")
    made.add_argument("--count", type=int, default=24000, help="pictures; one in ten is held out (default: 24000)")
    made.add_argument("--alone", type=float, default=0.65, help="share with one object, not two (default: 0.65)")
    made.add_argument("--seed", type=int, default=0, help="seed of the arrangements (default: 0)")
    made = command(kinds, "photos", "crops of photographs, yours or installed ones, split by photograph", _data_photos)
    made.add_argument("output", help="the folder to write")
    made.add_argument(
        "--photos", help="your folder of photographs, captioned as for training (default: installed ones)"
    )
    made.add_argument("--size", type=int, default=64, help="pixels a side (default: 64)")
    made.add_argument("--crops", type=int, default=120, help="crops of each photograph (default: 120)")
    made.add_argument("--heldout", type=float, default=0.2, help="share of photographs held out (default: 0.2)")
    made.add_argument("--seed", type=int, default=0, help="seeds the split and the crops (default: 0)")
    made = command(kinds, "inspect", "count what a folder would be trained on, and name what is broken", _data_inspect)
    made.add_argument("folder", help="the folder of pictures")
    made.add_argument("--sheet", metavar="FILE", help="a picture to write: some of those that are trained on")


def _data_inspect(arguments):
    from ldmfast.data.inspection import inspect
    from ldmfast.pictures import grid, writing

    said, shown, broken = inspect(arguments.folder)
    print("\n".join(said))
    if arguments.sheet and shown:
        with writing(arguments.sheet) as write:
            write(grid(shown))
        print(arguments.sheet)
    return int(broken)


def _data_emoji(arguments):
    from ldmfast.data import emoji

    if arguments.cutouts:
        cutouts = emoji.folder_cutouts(arguments.cutouts)
    else:
        cutouts = emoji.font_cutouts(arguments.font, arguments.objects)
    count = emoji.build(cutouts, arguments.output, size=arguments.size, count=arguments.placements)
    print(f"{arguments.output}: {count} pictures")


def _data_scenes(arguments):
    from ldmfast.data import emoji, scenes

    cutouts = emoji.folder_cutouts(arguments.cutouts) if arguments.cutouts else emoji.font_cutouts(arguments.font)
    count = scenes.build(cutouts, arguments.output, count=arguments.count, size=arguments.size, seed=arguments.seed)
    print(f"{arguments.output}: {count} scenes")


def _data_objects(arguments):
    from ldmfast.data import emoji, objects

    folder, font = arguments.cutouts, arguments.font
    cutouts = emoji.folder_cutouts(folder) if folder else emoji.font_cutouts(font, "320")
    settings = dict(count=arguments.count, size=arguments.size, seed=arguments.seed, alone=arguments.alone)
    count = objects.build(cutouts, arguments.output, **settings)
    print(f"{arguments.output}: {count} pictures")


def _data_photos(arguments):
    from ldmfast.data import photos

    count = photos.build(
        photos.collect(arguments.photos),
        arguments.output,
        size=arguments.size,
        count=arguments.crops,
        heldout=arguments.heldout,
        seed=arguments.seed,
    )
    print(f"{arguments.output}: {count} crops; their authors and licences are in metadata.jsonl")

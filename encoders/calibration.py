"""Synthetic catalogue items, for the mean of a backbone's features.

Backbones map all product titles, and all product pictures, into a narrow cone, so cosines of any two items are high.
Subtracting the mean of ordinary content removes that. No real catalogue can be distributed with this package, so the
content is drawn reproducibly from word lists and with Pillow.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from encoders.base import ItemContent

CALIBRATION = "1"
"""Part of the version of every encoder fitted on this content. Raise it with any change below."""


def _words_of(line: str) -> list[str]:
    return line.split(",")


# department: (kinds of thing, what they are made of or about, how they are described)
_DEPARTMENTS: dict[str, tuple[str, str, str]] = {
    "Womenswear": (
        "dress,blouse,skirt,cardigan,jumper,leggings,trousers,jeans,tunic,jumpsuit,coat,blazer,top,camisole,bodysuit,"
        "polo-neck,sweatshirt,vest,playsuit,shorts",
        "jersey,woven viscose,ribbed cotton,denim,satin,chiffon,lace,soft knit,crêpe,linen,corduroy,imitation leather",
        "with a round neckline,with long sleeves,with narrow shoulder straps,with buttons down the front,"
        "with a tie belt at the waist,with an elasticated waist,with a high waist and zip fly,with a flared skirt,"
        "with a wide collar,lined,with a concealed zip at the back,with slits at the sides",
    ),
    "Menswear": (
        "shirt,t-shirt,hoodie,chinos,joggers,polo shirt,suit jacket,jacket,parka,sweater,overshirt,cargo trousers,"
        "swim shorts,boxer shorts,waistcoat,tank top",
        "cotton,stretch cotton twill,wool blend,fleece,flannel,washed denim,nylon,oxford fabric,merino",
        "in a slim fit,in a regular fit with side pockets,with a chest pocket,with a drawstring hood,with a zip down "
        "the front,with ribbing at the cuffs and hem,with a button-down collar,with a printed motif,with tapered legs",
    ),
    "Kids and baby": (
        "romper suit,baby bodysuit,pyjamas,printed t-shirt,dungarees,snowsuit,leggings,tutu,rain jacket,sleepsuit,"
        "sun hat,school shirt",
        "organic cotton jersey,soft fleece,padded fabric,velour,sweatshirt fabric",
        "with press-studs,with a print motif,with covered elastic at the waist,with an animal on the front,"
        "in a set of two,with integral feet",
    ),
    "Shoes and accessories": (
        "trainers,ankle boots,sandals,pumps,loafers,ballet flats,scarf,beanie,leather belt,handbag,rucksack,"
        "sunglasses,earrings,necklace,ring set,gloves,tights,socks,bra,briefs,hair clip,cap,watch strap,purse",
        "imitation suede,leather,metal,canvas,mesh,cotton,wool,plastic,microfibre",
        "with a rubber sole,with a block heel,with a chain strap,with lacing,in various designs,with padded cups,"
        "with a pendant,with an inner compartment,with adjustable straps",
    ),
    "Beauty and care": (
        "face cream,shampoo,lipstick,perfume,nail varnish,body lotion,hand soap,mascara,toothbrush,razor,bath bomb",
        "argan oil,lavender,vanilla,aloe vera,vitamin C,rose",
        "for dry skin,for sensitive skin,long lasting,travel size,without perfume,for every day",
    ),
    "Home": (
        "cushion cover,duvet set,curtain,rug,vase,candle holder,table lamp,bath towel,tablecloth,storage basket,"
        "picture frame,sofa,bookcase,dining chair,mattress,mirror,wall clock,shower curtain",
        "linen,cotton velvet,glass,stoneware,oak,metal,jute,bamboo,marble",
        "for the living room,with a concealed zip,hand-made,with two shelves,in a set of four,machine-washable",
    ),
    "Kitchen": (
        "frying pan,knife set,coffee maker,kettle,blender,mug,wine glass,chopping board,baking tin,spatula,toaster,"
        "food container",
        "stainless steel,cast iron,ceramic,borosilicate glass,silicone,beech",
        "dishwasher-safe,for induction hobs,with lid,1.5 litres,non-stick,with timer",
    ),
    "Electronics": (
        "smartphone,laptop,wireless headphones,television,bluetooth speaker,camera,power bank,usb cable,smart watch,"
        "tablet,game controller,keyboard,router,monitor,hard drive,phone case,printer",
        "4K,USB-C,OLED,noise-cancelling,64 GB,wifi 6,1080p",
        "with fast charging,with two years of warranty,water-resistant,with backlight,for gaming,refurbished",
    ),
    "Toys and games": (
        "board game,puzzle,doll,building blocks,toy train,plush bear,card game,remote control car,play kitchen,kite",
        "wood,plastic,soft plush,cardboard",
        "for ages 3 and up,for two to six players,1000 pieces,with batteries,educational",
    ),
    "Sport and outdoors": (
        "running shoes,yoga mat,tent,sleeping bag,bicycle helmet,dumbbells,football,tennis racket,ski goggles,"
        "water bottle,fishing rod,swimsuit,climbing rope",
        "carbon,breathable mesh,ripstop nylon,neoprene,aluminium",
        "for beginners,ultralight,waterproof,for two people,with reflective details,quick-drying",
    ),
    "Garden and tools": (
        "cordless drill,screwdriver set,garden hose,lawn mower,plant pot,tomato seeds,hedge trimmer,ladder,paint,"
        "work gloves,led bulb",
        "18 V,steel,terracotta,galvanised metal",
        "with two batteries,for indoor and outdoor use,weatherproof,20 metres,with case",
    ),
    "Food and drink": (
        "dark chocolate,olive oil,green tea,coffee beans,spaghetti,honey,red wine,craft beer,granola,hot sauce,"
        "cheddar,rice,dog food",
        "organic,fair trade,gluten-free,Italian,smoked,wholegrain",
        "500 g,pack of six,lightly salted,from a single farm,vegan,12 months old",
    ),
    "Cars and pets": (
        "car seat cover,tyre,dash cam,motor oil,cat tree,dog lead,aquarium,bird cage,bike rack,child seat",
        "rubber,synthetic,nylon,sisal,chrome",
        "universal fit,for large breeds,with installation kit,easy to clean,adjustable",
    ),
    "Books and music": (
        "novel,cookbook,travel guide,biography,vinyl album,picture book,sheet music,dictionary,comic,poems,calendar",
        "history,gardening,jazz,philosophy,science,crime,mythology,Spanish",
        "paperback,with illustrations,second edition,large print,signed,for students",
    ),
}
_GENRES = _words_of(
    "Drama,Comedy,Thriller,Action,Romance,Horror,Documentary,Animation,Adventure,Crime,Sci-Fi,Family,Mystery"
)
_TITLE_WORDS = _words_of(
    "night,house,king,river,shadow,last,summer,girl,war,heart,city,secret,stranger,fire,winter,road,brother,game,"
    "moon,dead,love,island,train,ghost,journey,blood,dream,star,father,silence,golden,broken,wild,storm,promise,"
    "mirror,garden,hunter,soldier,dance,bridge,revenge,angel,monster,escape,paradise,letter,return,crown,ocean"
)
_TITLE_SHAPES = (
    "The {a} {b}", "{a} of the {b}", "{a}", "The {a}", "{a} & {b}", "{a} in the {b}", "My {a}", "{a}: The {b}",
    "Beyond the {a}", "{a} {n}", "A {a} for {b}", "No {a}",
)  # fmt: skip
_PLACES = _words_of("Paris,London,Tokyo,Texas,Moscow,Havana,Berlin,Cairo")
_COLOURS = {
    "black": (25, 25, 28), "white": (244, 243, 240), "navy": (30, 40, 80), "red": (190, 35, 45),
    "light pink": (240, 200, 205), "beige": (215, 195, 165), "dark green": (35, 75, 55), "grey": (140, 140, 145),
    "light blue": (165, 200, 230), "yellow": (235, 200, 70), "brown": (110, 75, 50), "purple": (105, 60, 130),
    "orange": (225, 120, 45), "turquoise": (60, 170, 170),
}  # fmt: skip


def calibration_items(count: int, *, seed: int = 0) -> list[ItemContent]:
    """`count` made-up items without pictures: half shop goods of all departments, half films. Same seed, same items."""
    rng = random.Random(seed)
    return [_film(rng) if number % 2 else _product(rng) for number in range(count)]


def loose_words(vocabulary: Sequence[str], count: int, *, seed: int = 0) -> list[str]:
    """`count` lines of three words that have nothing to do with each other, so that a fit is not bound to our lists."""
    rng = random.Random(seed)
    return [" ".join(rng.sample(vocabulary, 3)) for _ in range(count)]


def _product(rng: random.Random) -> ItemContent:
    department = rng.choice(list(_DEPARTMENTS))
    things, materials, details = (part.split(",") for part in _DEPARTMENTS[department])
    thing, material, detail = rng.choice(things), rng.choice(materials), rng.choice(details)
    colour = rng.choice(list(_COLOURS))
    title = rng.choice(
        [thing, f"{material} {thing}", f"{colour} {thing}", f"{thing} {detail}", f"{rng.choice(_TITLE_WORDS)} {thing}"]
    ).capitalize()
    text = rng.choice(
        ["", f"{thing} in {material} {detail}.", f"{thing} {detail}. {rng.choice(details)}, {rng.choice(details)}."]
    ).capitalize()
    return ItemContent(title=title, text=text, category=rng.choice([thing.capitalize(), department, None]))


def _film(rng: random.Random) -> ItemContent:
    a, b = rng.sample(_TITLE_WORDS, 2)
    shape = rng.choice(_TITLE_SHAPES)
    title = shape.format(a=a.capitalize(), b=rng.choice([b.capitalize(), rng.choice(_PLACES)]), n=rng.randint(2, 5))
    return ItemContent(title=title, category=", ".join(rng.sample(_GENRES, rng.randint(1, 3))))


def calibration_pictures(count: int, *, size: int, seed: int = 0) -> list[NDArray[np.uint8]]:
    """`count` drawn (size, size, 3) pictures: things on a plain ground, patterns, cards with lettering."""
    rng = random.Random(seed)
    kinds: list[Callable[[random.Random, int], Image.Image]] = [_thing, _thing, _pattern, _card]
    return [np.array(kinds[number % len(kinds)](rng, size), dtype=np.uint8) for number in range(count)]


def _colour(rng: random.Random) -> tuple[int, int, int]:
    red, green, blue = rng.choice(list(_COLOURS.values()))
    return tuple(min(255, max(0, part + rng.randint(-20, 20))) for part in (red, green, blue))  # type: ignore[return-value]


def _ground(rng: random.Random, size: int) -> Image.Image:
    """Studio grey or white, or two colours that run into each other."""
    if rng.random() < 0.5:
        return Image.new("RGB", (size, size), (rng.randint(225, 255),) * 3)
    mask = Image.linear_gradient("L").resize((size, size)).rotate(rng.choice([0, 90, 180, 270]))
    return Image.composite(
        Image.new("RGB", (size, size), _colour(rng)), Image.new("RGB", (size, size), _colour(rng)), mask
    )


def _thing(rng: random.Random, size: int) -> Image.Image:
    """A few soft-edged forms with a shadow and some shading, about the middle."""
    image = _ground(rng, size)
    for _ in range(rng.randint(1, 4)):
        mask = Image.new("L", (size, size), 0)
        draw = ImageDraw.Draw(mask)
        cx, cy = size * rng.uniform(0.35, 0.65), size * rng.uniform(0.3, 0.7)
        rx, ry = size * rng.uniform(0.08, 0.35), size * rng.uniform(0.1, 0.42)
        form = rng.randrange(4)
        if form == 0:
            draw.ellipse((cx - rx, cy - ry, cx + rx, cy + ry), fill=255)
        elif form == 1:
            draw.rounded_rectangle((cx - rx, cy - ry, cx + rx, cy + ry), radius=size // 12, fill=255)
        else:
            corners = [(cx + rng.uniform(-1, 1) * rx, cy + rng.uniform(-1, 1) * ry) for _ in range(rng.randint(3, 8))]
            draw.polygon(corners, fill=255)
        mask = mask.filter(ImageFilter.GaussianBlur(size / 128))
        image.paste((90, 90, 95), (size // 40, size // 40), mask.filter(ImageFilter.GaussianBlur(size / 32)))
        shade = Image.radial_gradient("L").resize((size, size)).point(lambda v: 255 - v // 2)
        plain = Image.new("RGB", (size, size), _colour(rng))
        worn = _pattern(rng, size) if rng.random() < 0.3 else Image.new("RGB", (size, size), _colour(rng))
        filling = Image.composite(worn, plain, shade)
        image.paste(filling, (0, 0), mask)
    return _grain(rng, image)


def _pattern(rng: random.Random, size: int) -> Image.Image:
    """Stripes, checks or dots."""
    image = Image.new("RGB", (size, size), _colour(rng))
    draw = ImageDraw.Draw(image)
    step, ink, kind = rng.randint(size // 16, size // 4), _colour(rng), rng.randrange(3)
    for x in range(0, size, step):
        if kind < 2:
            draw.rectangle((x, 0, x + step // 3, size), fill=ink)
        for y in range(0, size, step):
            if kind == 1:
                draw.rectangle((0, y, size, y + step // 4), fill=ink)
            elif kind == 2:
                draw.ellipse((x, y, x + step // 2, y + step // 2), fill=ink)
    return image.rotate(rng.choice([0, 45, 90]))


def _card(rng: random.Random, size: int) -> Image.Image:
    """A title card or a poster: forms behind, a few lines of lettering in front."""
    image = _thing(rng, size) if rng.random() < 0.5 else _ground(rng, size)
    draw = ImageDraw.Draw(image)
    y = size * rng.uniform(0.05, 0.5)
    for _ in range(rng.randint(1, 4)):
        height = rng.randint(max(8, size // 14), max(9, size // 6))
        draw.text((size * rng.uniform(0.03, 0.2), y), " ".join(rng.sample(_TITLE_WORDS, 2)).upper(), fill=_colour(rng),
                  font_size=height)  # fmt: skip
        y += height * 1.3
    return image


def _grain(rng: random.Random, image: Image.Image) -> Image.Image:
    noise = Image.frombytes("L", image.size, rng.randbytes(image.size[0] * image.size[1]))
    return Image.blend(image, noise.convert("RGB"), rng.uniform(0.0, 0.08))

"""Sentences to say, endlessly many, that fall into three sets without a sentence in common."""

import zlib

import numpy as np

SPLITS = ("train", "validation", "held-out")

WORDS = {
    "who": "I;you;we;they;the teacher;my mother;our father;a young girl;the old man;her brother;"
    "his sister;the captain;a farmer;the doctor;somebody;everyone;the new neighbour;a boy;"
    "the baker;our team;the judge;a stranger;the whole village;my uncle;the painter;a nurse;"
    "two friends;the children;people;the king;your cousin;the pilot;a clever fox;the shepherd",
    "did": "found;saw;bought;made;lost;wanted;carried;opened;washed;painted;broke;showed;kept;"
    "sold;moved;fixed;brought;pushed;threw;watched;needed;loved;chose;built;remembered;mended;"
    "packed;wrapped;heard;measured;shook;swapped;cut;burned;borrowed;polished;hid;described",
    "will": "find;see;buy;make;take;want;carry;open;wash;paint;break;show;keep;sell;move;fix;"
    "bring;push;throw;watch;need;love;choose;build;use;follow;give away;mix;catch;pull;join",
    "how": "big;small;blue;warm;cold;heavy;empty;purple;broken;shiny;funny;quiet;wooden;yellow;"
    "smooth;huge;little;bright;round;golden;wet;sharp;simple;strange;beautiful;soft;green;proper;"
    "famous;loud;thick;cheap;modern;plain;brown;hollow;charming;rough;sour;fluffy",
    "what": "book;map;boat;house;bottle;box;table;lamp;apple;window;camera;hammer;coat;bicycle;"
    "piano;garden;letter;ship;shoe;basket;mirror;bell;clock;drum;feather;pumpkin;umbrella;puzzle;"
    "blanket;kite;guitar;button;bridge;pillow;spoon;chair;fish;mushroom;telephone;cheese;candle;"
    "bag;cup;tower;wheel;jar;whistle;picture;watch;moth;bubble;pie;wolf;beehive;photograph",
    "where": "in the kitchen;near the river;behind the church;at the market;on the roof;"
    "under the bridge;by the sea;in the forest;at school;beside the road;on top of the hill;"
    "between two trees;along the beach;outside;in the middle of the room;above the shop;"
    "over there;across the valley;inside the cave;at the far end of the garden;on the boat",
    "when": "today;yesterday;this morning;last week;every summer;before lunch;at half past five;"
    "after the show;once more;in October;on Wednesday;at midnight;right now;soon;all day long;"
    "for a while;after breakfast;on a rainy afternoon;in the year two thousand;at noon",
    "felt": "happy;sure;afraid;proud;tired;ready;surprised;hungry;sad;glad;angry;curious;calm;"
    "puzzled;amused;nervous;hopeful;bored;thankful;worried",
    "manner": "slowly;quickly;carefully;without a word;with great care;very well;too early;again;"
    "by chance;as usual;in a hurry;together;almost by accident;with both hands;bravely;quietly",
    "number": "two;three;four;five;six;seven;eight;nine;ten;eleven;twelve;fifteen;twenty;forty;"
    "fifty;seventy;ninety;a hundred;a thousand;several;many;a few;about eighty;a dozen",
    "many": "books;boats;houses;bottles;boxes;apples;windows;letters;ships;shoes;bells;feathers;"
    "pumpkins;kites;bridges;birds;mice;sheep;foxes;people;flowers;potatoes;mushrooms;peaches;"
    "bubbles;vegetables;photographs;whales;giraffes;chickens;oysters;judges",
    "opener": "well;by the way;of course;listen;as far as I know;in fact;perhaps;actually;"
    "to be honest;oh;after all;on the other hand;for example;you know;all right;meanwhile",
    "talk": "how are you;thank you very much;what do you mean;that sounds wonderful;"
    "please wait for me;I could not agree more;who told you that;good morning everybody;"
    "let us begin with the basics;I will be back in a moment;why should we hurry;"
    "it was a pleasure to meet you;could you repeat that;have you ever been there;"
    "do not worry about it;may I ask you a question;I hope you both enjoy your evening",
}  # fmt: skip
FORMS = (
    "{who} {did} a {how} {what} {where}.",
    "{who} {did} the {what} {when}.",
    "{when}, {who} {did} {number} {how} {many}.",
    "{opener}, {who} {did} the {how} {what} {manner}.",
    "Did {who} really {will} a {what} {where}?",
    "{who} will {will} {number} {many} {when}.",
    "{who} felt {felt}, because {who} {did} the {what}.",
    "{talk}? {who} {did} it {manner}.",
    "{opener}, {talk}.",
    "The {what} {where} is {how}, but the {what} is {how}.",
    "If {who} can {will} the {what}, {who} may {will} {number} {many}.",
    "{number} {many} and a {how} {what}: {who} {did} them {where}.",
    "{who} said {manner}: {talk}!",
    "There were {number} {how} {many} {where} {when}.",
    "{how} {what}, {how} {what}, {number} {many}, {how} {what}.",
    "When {who} {did} the {how} {what}, everybody was {felt}.",
)
LISTS = {name: tuple(words.split(";")) for name, words in WORDS.items()}


def sentence(rng: np.random.Generator, split: str) -> str:
    """A sentence of one of SPLITS, which sentences belong to by their own letters."""
    while True:
        text = FORMS[rng.integers(len(FORMS))]
        while "{" in text:
            before, _, rest = text.partition("{")
            name, _, after = rest.partition("}")
            words = LISTS[name]
            text = before + words[rng.integers(len(words))] + after
        text = text[0].upper() + text[1:]
        if split_of(text) == split:
            return text


def split_of(text: str) -> str:
    """Which of SPLITS a sentence is in: eight of ten train, one validates, one is held out."""
    number = zlib.crc32(text.lower().encode()) % 10
    return SPLITS[max(0, number - 7)]

"""The passages that every build is measured on, written for this project: short, and of many kinds.

The first ones differ most from each other, because a quick check takes only those.
"""

PROSE = """\
The ferry left at six, when the fog still lay on the water and the lamps along the quay were burning. Marta \
stood at the rail with her collar turned up and counted the gulls on the breakwater. She had promised her \
brother that she would write as soon as she arrived, and she was already looking for the first sentence."""

PYTHON = '''\
def moving_average(values: list[float], width: int) -> list[float]:
    """Averages of `width` neighbours; the result is shorter by width - 1."""
    if not 1 <= width <= len(values):
        raise ValueError(f"width {width} does not fit {len(values)} values")
    total = sum(values[:width])
    averages = [total / width]
    for old, new in zip(values, values[width:]):
        total += new - old
        averages.append(total / width)
    return averages'''

DIALOGUE = """\
"Did you lock the greenhouse?" asked Tom.
"I thought you had the key."
"No. You took it this morning, when the delivery came."
"Then it is on the kitchen table, under the newspaper," she said, "and the door has been open all day."
He sighed. "The tomatoes will forgive us. The neighbour's goat is another matter."
"""

NUMBERS = """\
On 14 March 2019 the station measured 12.7 degrees at 08:30 and 19.4 at 15:45; on 15 March it was 3.1 and \
8.86. The mean of 1,024 readings was 11.93, the variance 4.0625 and the largest gap 36 hours. Invoice \
77-0042 comes to 3 x 249.90 = 749.70, plus 19 % tax: 892.14 in all."""

GERMAN = """\
Im Herbst, wenn die Äpfel reif sind und die Tage kürzer werden, riecht es im ganzen Haus nach Zimt. Die \
Großmutter schneidet das Obst in dünne Scheiben, der Junge zählt die Gläser auf dem Regal, und draußen fällt \
der Regen so leise, dass man ihn nur hört, wenn niemand spricht."""

JSON = """\
{
  "order": {"id": 5817, "status": "shipped", "express": true, "discount": null},
  "items": [
    {"sku": "LMP-204", "name": "Desk lamp, brass", "quantity": 2, "price": 39.5},
    {"sku": "BLB-010", "name": "LED bulb (E14)", "quantity": 6, "price": 2.95}
  ],
  "tags": ["gift", "fragile"],
  "note": "Leave it with the caretaker; ring twice."
}"""

TABLE = """\
| River     | Length (km) | Mouth         |
|-----------|------------:|---------------|
| Danube    |        2850 | Black Sea     |
| Rhine     |        1233 | North Sea     |
| Loire     |        1006 | Atlantic      |
| Po        |         652 | Adriatic Sea  |

The Danube is the longest of the four and the Po the shortest."""

FRENCH = """\
Chaque dimanche, le marché s'installe sous les platanes : on y trouve des fromages, des olives et parfois un \
accordéoniste qui joue trop vite. Ma voisine y va tôt, dit-elle, parce qu'après neuf heures il n'y a plus ni \
fraises ni places à l'ombre. Hier, pourtant, elle est revenue les mains vides, mais très contente."""

JAPANESE = """\
朝の電車はいつもより空いていたので、窓際に座ることができた。川を渡るとき、水の上に白い鳥が三羽見えた。\
隣の席の子どもが指をさして「おはよう」と言うと、母親は静かに笑った。次の駅で降りて、図書館まで十分ほど歩いた。"""

LIST = """\
To bring on Saturday:
1. the tent, with all eleven pegs
2. two sleeping bags and the thin blue blanket
3. a pot, a pan, matches in a dry tin
4. bread, cheese, apples, coffee, a little salt
5. a map on paper, because there is no signal in the valley
6. the first-aid box (check the date on the plasters)
7. a torch and spare batteries"""

EMAIL = """\
From: h.lindqvist@example.org
To: workshop@example.org
Subject: Re: Repair of the oak chair

Hello,

thank you for the estimate. Please go ahead with the new seat, but keep the old screws if you can: they are \
the original ones. I can pick the chair up on Thursday after 17:00, or on Friday before noon.

Kind regards,
Hanna Lindqvist
P.S. Is the left arm worth saving?"""

REPEATED = " ".join(["The clock in the hall strikes once and nobody comes."] * 8)

PASSAGES = {
    "prose": PROSE,
    "Python": PYTHON,
    "dialogue": DIALOGUE,
    "numbers and dates": NUMBERS,
    "German": GERMAN,
    "JSON": JSON,
    "table": TABLE,
    "French": FRENCH,
    "Japanese": JAPANESE,
    "list": LIST,
    "email": EMAIL,
    "a sentence repeated": REPEATED,
}
"""Name → passage."""

"""What the demo asks: real prompts of many lengths, as a service would send them."""

from __future__ import annotations

from typing import Any, Final

_QUESTIONS: Final = (
    "What does a grist mill do?",
    "Name three uses of a water wheel.",
    "Why is the sky blue? Answer in one sentence.",
    "Translate to French: The bread is still warm.",
    "Write a haiku about a river.",
    "What is the capital of Portugal?",
    "Explain to a child why boats float.",
    "List the four seasons.",
    "What is the difference between a queue and a stack?",
    "Give me a short recipe for pancakes.",
    "Summarise in five words: The meeting was moved from Tuesday to Thursday because the room was "
    "taken and two of the speakers were travelling.",
    "Is this review positive or negative? 'The flour was fresh and arrived a day early.'",
    "Rewrite politely: Send me the invoice now.",
    "Which is heavier, a kilogram of feathers or a kilogram of iron?",
    "Suggest a name for a small bakery.",
    "Complete the proverb: All is not gold that",
    "What is the plural of mouse?",
    "Extract the city: Maria moved from Lima to Oslo in 2019.",
    "Write one sentence that ends with the word stone.",
    "How many minutes are in three hours?",
    "Why do leaves turn red in autumn?",
    "Give two synonyms for quick.",
    "What should I bring to a picnic?",
    "Describe the sound of rain on a tin roof.",
)
_BEGINNINGS: Final = (
    "A grist mill is a building in which",
    "The miller opened the gate and the water",
    "Once upon a time, in a village by a river,",
    "The three most common kinds of flour are",
    "To bake a loaf of bread, first",
    "def mean(numbers):\n    ",
    "Dear Ms. Alvarez,\n\nThank you for your order of",
    "The history of the water wheel begins",
    "Q: What is stone-ground flour?\nA:",
    "In physics, power is defined as",
    "Shopping list:\n- eggs\n- milk\n-",
    "The quick brown fox",
)
_TEXTS: Final = (
    "water wheel",
    "How do I return a damaged parcel?",
    "My order has not arrived yet.",
    "stone-ground whole wheat flour, 5 kg",
    "The turbine was replaced in March and has run without a fault since.",
    "Recipe: sourdough with rye",
    "Can I change the delivery address?",
    "A mill race is the channel that leads water to the wheel.",
    "Opening hours on public holidays",
    "refund policy",
    "Das Mehl ist fein gemahlen.",
    "Le moulin tourne jour et nuit.",
)
_LENGTHS: Final = (16, 24, 32, 48)
"""Most tokens to generate, in turn: answers end at different times, as in life."""


def prompts() -> list[dict[str, Any]]:
    """24 chats, 12 completions and 12 embeddings, well mixed; always the same."""
    generated: list[dict[str, Any]] = [
        *({"messages": [{"role": "user", "content": question}]} for question in _QUESTIONS),
        *({"prompt": beginning} for beginning in _BEGINNINGS),
    ]
    asked = [
        body | {"max_tokens": _LENGTHS[number % len(_LENGTHS)], "temperature": 0.0}
        for number, body in enumerate(generated)
    ]
    asked += [{"input": text} for text in _TEXTS]
    return [asked[number * 7 % len(asked)] for number in range(len(asked))]

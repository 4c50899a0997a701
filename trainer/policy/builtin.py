"""What tiny-k2 knows when it is given no examples: a small help desk, generated, and a list of common words."""

from __future__ import annotations

import random

TOPICS = {
    "order_status": ["where is my {thing}", "has my {thing} been sent", "when will the {thing} arrive"],
    "return_item": ["I want to return the {thing}", "how do I send my {thing} back", "the {thing} does not fit"],
    "refund_missing": ["I never got my money back for the {thing}", "my refund for the {thing} is missing"],
    "damaged_item": ["the {thing} came broken", "my {thing} is damaged", "the {thing} stopped working"],
    "change_address": ["please send the {thing} to another address", "I moved, change the address of my {thing}"],
    "cancel_order": ["cancel my {thing}", "I do not want the {thing} any more", "please stop the order of the {thing}"],
    "payment_failed": ["my payment for the {thing} failed", "the card was declined when I paid for the {thing}"],
    "price_question": ["how much is the {thing}", "what does the {thing} cost", "is there a discount on the {thing}"],
    "reset_password": ["I forgot my password for the {thing}", "I cannot log in to see my {thing}"],
    "talk_to_person": ["let me speak to a person about my {thing}", "I need a human to help with the {thing}"],
}
THINGS = ("order", "parcel", "shoes", "coat", "phone", "laptop", "chair", "lamp", "book", "camera", "bag", "watch")
POLITE = ["", "hi, ", "hello, ", "please help: ", "excuse me, ", "good morning, "]
WORDS = (
    " the be to of and a in that have i it for not on with he as you do at this but his by from they we say her she "
    "or an will my one all would there their what so up out if about who get which go me when make can like time no "
    "just him know take people into year your good some could them see other than then now look only come its over "
    "think also back after use two how our work first well way even new want because any these give day most us is "
    "was are been has had did does please help need why where card account money pay order sent send again still"
)


def desk(seed: int = 0, each: int = 12) -> list[tuple[str, str]]:
    """Messages of a made-up shop's customers, each with its topic: ``each`` a topic, the same for the same seed."""
    chance = random.Random(seed)
    made = []
    for topic, forms in TOPICS.items():
        for _ in range(each):
            said = chance.choice(POLITE) + chance.choice(forms).format(thing=chance.choice(THINGS))
            made.append((said, topic))
    return made

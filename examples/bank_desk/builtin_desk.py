"""A small desk that is always there: messages put together from openings, phrasings and closings.

Made so that the demo works without any file. Its messages are simpler than people's, and results on it say only
that the loop closes.
"""

from __future__ import annotations

import itertools
import random

A_TOPIC = 200  # messages of each topic, of which a quarter is held out
HELD_OUT = 30

OPENINGS = ("", "Hi, ", "Hello there, ", "Good morning. ", "Please help: ", "Quick question, ", "Sorry to ask, but ")
CLOSINGS = ("", " Thanks.", " What should I do?", " Can you help?", " I need this today.", " Please advise.")

PHRASINGS: dict[str, tuple[str, ...]] = {
    "card_not_arrived": (
        "my new card has not come yet",
        "I ordered a card two weeks ago and nothing is in the post",
        "when will the card you sent get here",
        "the card I was promised is still missing from my mailbox",
        "how long does delivery of a card take",
        "no letter with plastic in it has reached me",
        "I am still waiting for what you mailed",
        "the postman brought nothing from you again",
        "has my order for a replacement been shipped",
    ),
    "lost_card": (
        "I cannot find my card anywhere",
        "my wallet is gone and the card was in it",
        "someone stole my card on the train",
        "I left my card in a taxi",
        "please block the card, I have lost it",
        "it fell out of my pocket somewhere",
        "my bag was taken with everything in it",
        "I think I dropped it in a shop and it is gone",
        "a thief has what I pay with",
    ),
    "forgotten_pin": (
        "I do not remember my PIN",
        "the machine says my PIN is wrong",
        "how can I set a new PIN",
        "I typed the wrong code three times and now it is blocked",
        "I never received the PIN for my card",
        "which four digits do I enter at the till",
        "the code for paying slipped my mind",
        "I need the secret number sent again",
        "I keep entering the wrong digits",
    ),
    "transfer_pending": (
        "my transfer still shows as pending",
        "the money I sent yesterday has not arrived",
        "why does my payment to a friend take so long",
        "how many days does a bank transfer take",
        "the person I paid says nothing came in",
        "what I paid to my landlord is still on its way",
        "my sister has not received the amount",
        "it has been three days since I sent it",
        "the status of my payment does not change",
    ),
    "transfer_failed": (
        "my transfer was declined",
        "I tried to send money and it failed",
        "the app refuses my payment to another account",
        "an error comes up whenever I send money",
        "why was my transfer rejected",
        "the amount came back to me at once",
        "I cannot pay my landlord, it says no",
        "sending to that account is not possible",
        "what is wrong with the recipient that I entered",
    ),
    "exchange_rate": (
        "which exchange rate do you use",
        "the rate for my purchase abroad looks wrong",
        "how much is one euro in dollars with you",
        "I was charged a poor rate on holiday",
        "where can I see the rate before I pay in another currency",
        "how do you convert pounds",
        "the conversion cost me more than expected",
        "do you take the market's price for currencies",
        "yen to euro seems off on my bill",
    ),
    "cash_withdrawal_fee": (
        "I was charged a fee at the cash machine",
        "is taking out cash free",
        "why did a withdrawal cost extra",
        "what do you charge for cash from an ATM",
        "there is a fee on my statement for getting cash",
        "the hole in the wall took two pounds more",
        "do I pay for getting notes out",
        "my withdrawal was more expensive than the notes",
        "is there a free amount of cash each month",
    ),
    "card_payment_declined": (
        "the shop's terminal declined my card",
        "my card does not work in stores",
        "I could not pay for my groceries with the card",
        "online shops refuse my card",
        "my card payment did not go through at the restaurant",
        "the till said no when I tapped",
        "I was embarrassed at the counter, nothing worked",
        "contactless is refused everywhere",
        "my order on a website was not accepted",
    ),
    "refund_missing": (
        "the refund from a shop is not on my account",
        "I returned an item and the money has not come back",
        "the merchant says it refunded me, but I see nothing",
        "when does a refund show up",
        "where is the money for my cancelled order",
        "I sent the shoes back and am still out of pocket",
        "the seller promised my money last week",
        "a cancelled booking was never paid back",
        "how long until the store's credit reaches me",
    ),
    "unknown_charge": (
        "there is a charge I do not recognise",
        "I never bought what is on my statement",
        "who took forty pounds from my account",
        "a payment that is not mine appeared this morning",
        "I think somebody used my details to buy something",
        "I was never in that shop",
        "what is this amount for",
        "someone else spends with my details",
        "two debits this week are strange to me",
    ),
    "close_account": (
        "I want to close my account",
        "how do I leave your bank",
        "please delete my account",
        "I would like to cancel everything and take my money out",
        "I am moving to another bank and need to end this one",
        "I no longer need your services",
        "goodbye, please shut everything down",
        "terminate my contract",
        "how can I stop being a customer",
    ),
    "change_address": (
        "I have moved to a new flat",
        "how do I change my address",
        "my post goes to the old house",
        "please update where I live",
        "I need to correct the street in my profile",
        "letters should go to another place now",
        "we have a different postcode since May",
        "I relocated to another city",
        "my house number is wrong in your files",
    ),
    "verify_identity": (
        "you ask me to prove who I am",
        "which documents do you need for identification",
        "my passport photo was not accepted",
        "why must I verify my identity",
        "the identity check does not finish",
        "you rejected the picture of my licence",
        "is a residence permit enough as proof",
        "I uploaded my papers and hear nothing",
        "what must I show to be approved",
    ),
    "top_up": (
        "how can I add money to my account",
        "my top up has not appeared",
        "can I load money from another card",
        "topping up by bank transfer did not work",
        "what is the limit for adding money",
        "how do I put funds in",
        "my deposit is not in the balance",
        "adding fifty pounds gives an error",
        "can my employer pay in directly",
    ),
    "virtual_card": (
        "can I have a card that exists only on my phone",
        "how do I get a disposable card number",
        "I want a virtual card for online shopping",
        "where do I find the digital card",
        "does the virtual card have a limit",
        "a number for one purchase only would be handy",
        "do you offer cards without plastic",
        "I need something for a risky website",
        "can I pay with my phone before the post arrives",
    ),
    "joint_account": (
        "can my husband use the account as well",
        "I would like to share an account with my partner",
        "how do we open a joint account",
        "can two people own one account",
        "please add my daughter to my account",
        "my wife and I want to pay bills together",
        "is it possible to have a second owner",
        "give my flatmate access too",
        "we are a couple and need one place for rent",
    ),
}


def messages(seed: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(training part, held-out part) as (text, topic) pairs; the same for the same seed."""
    dice = random.Random(seed)
    train: list[tuple[str, str]] = []
    test: list[tuple[str, str]] = []
    for topic, phrasings in PHRASINGS.items():
        every = [_sentence(*parts) for parts in itertools.product(OPENINGS, phrasings, CLOSINGS)]
        drawn = [(text, topic) for text in dice.sample(every, A_TOPIC)]
        test += drawn[:HELD_OUT]
        train += drawn[HELD_OUT:]
    dice.shuffle(train)
    return train, test


def _sentence(opening: str, phrasing: str, closing: str) -> str:
    starts_sentence = not opening or opening.endswith(". ")
    text = phrasing[0].upper() + phrasing[1:] if starts_sentence else phrasing
    return f"{opening}{text}{'?' if _asks(phrasing) else '.'}{closing}"


def _asks(phrasing: str) -> bool:
    return phrasing.split()[0] in {"how", "why", "when", "where", "which", "who", "what", "can", "is", "does"}

"""What an explanation says of people's words: by the trust that the score was made with, not by what is supposed."""

import pytest
from everloop.feedback import Feedback

from reward import evidence
from reward.declaration import Declaration
from reward.explain import alternatives, told, weighed
from reward.model import Estimate
from reward.reliability import Piece, Reliability, rater_of
from reward.taught import name_of

OPINION = Estimate(0.6, 0.05, 0.15, True, (0.4, 0.4, 0.4))
CARELESS = Feedback(id="f", kind="thumb", value=1, time=1.0, rater="careless")
IGNORED = Feedback(id="i", kind="implicit", name="abandoned", value=0.0, time=1.0)


@pytest.fixture
def trust():
    """Thumbs are mostly right, and those of one rater no better than chance, as outcomes show."""
    made = Reliability(Declaration.model_validate({"signals": {"implicit:abandoned": {"count": False}}}))
    for number in range(200):
        good = float(number % 2)
        made.learn([Piece("outcome", None, good), Piece("thumb", f"r{number % 9}", good)])
        if number < 80:
            made.learn([Piece("outcome", None, good), Piece("thumb", rater_of(CARELESS), float(number % 4 < 2))])
    return made


def test_a_word_has_its_source_and_what_its_rater_is_found_to_be_worth(trust):
    careful = CARELESS.model_copy(update={"rater": None})
    (by_careless,), (by_anybody,) = weighed("a", (CARELESS,), trust), weighed("a", (careful,), trust)
    assert by_careless.source == "thumb"
    assert by_careless.log_odds == pytest.approx(evidence.said_of("a", (CARELESS,), trust).odds)
    assert by_careless.log_odds < 0.5 < by_anybody.log_odds
    line = told(evidence.said_of("a", (CARELESS,), trust), [by_careless])[0]
    assert f"by careless ({name_of('rater', 'careless')}): thumb, +" in line


def test_what_the_declaration_does_not_count_and_what_decides_is_said(trust):
    outcome = Feedback(id="o", kind="outcome", name="kept", value=0.0, time=2.0)
    words = (IGNORED, CARELESS, outcome)
    lines = told(evidence.said_of("a", words, trust), weighed("a", words, trust))
    assert "which the declaration does not count" in lines[0]
    assert lines[2].endswith("outcome, measured")
    assert lines[-1] == "an outcome decides: 0"


def test_words_that_come_to_more_than_may_count_are_said_to_be_cut():
    strict = Reliability(Declaration.model_validate({"combine": {"cap": 1.0}}))
    (line, together) = told(evidence.said_of("a", (CARELESS,), strict), weighed("a", (CARELESS,), strict))
    assert "+2.94 log-odds" in line
    assert together == "together +1.00 log-odds (+2.94, of which no more counts)"


def test_alternatives_follow_the_same_trust(trust):
    def up(believed):
        return dict(alternatives(OPINION, "a", (), 0.5, believed))["one more thumb up"].value

    supposed = Reliability()
    assert up(supposed) != pytest.approx(up(trust), abs=1e-3)
    word = Feedback(id="x", kind="thumb", value=1, time=2.0)
    assert up(trust) == evidence.decide(OPINION, evidence.said_of("a", (word,), trust), 0.5)[0].value


def test_of_held_words_it_is_said_what_they_would_do(trust):
    ((name, changed),) = alternatives(OPINION, "a", (CARELESS,), 0.5, trust, held=True)
    assert name == "its words were believed"
    assert changed.value > OPINION.value

"""What is worth nothing is always scored so: it never escapes its penalty by leaving the model unsure."""

import pytest
from everloop.config import RewardConfig
from everloop.event import ToolResult
from everloop.feedback import Feedback
from everloop.score import Score

from reward.features import ANSWER_CHARS, Example
from reward.floor import broken_call, worthless
from reward.handler import RewardHandler
from reward.model import RewardModel

BROKEN = ('{"name": "respond", "arguments": {', '<tool_call>{"name": "respond", "argu', '{"arguments": [1, 2')


@pytest.mark.parametrize("answer", ["", "  ", *BROKEN])
def test_it_is_scored_even_where_the_model_has_no_right_to_an_opinion(words, answer):
    (estimate, other) = RewardModel(RewardConfig(), words).estimate(
        [Example("Where is it?", answer), Example("Where is it?", "On its way.")]
    )
    assert (estimate.reward, estimate.mask) == (pytest.approx(-1.0), True)
    assert not other.mask


def test_episodes_that_failed_or_stayed_empty_are_scored_with_the_lowest_reward(home, words, kit):
    from everloop.config import Config

    config = Config.model_validate({"home": home.root, "tenants": {"default": {}}})
    handler, state = RewardHandler(config, home, lambda name: words), kit.MemoryState()
    praised = Feedback(id="bought", kind="thumb", value=1, time=1.0, rater="bot")
    failed = ToolResult(id="t", call="broken-c0", name="respond", arguments="{", result="", error=True)
    made = [
        kit.episode("empty", ("Where is it?", "")),
        kit.episode("praised", ("Where is it?", ""), feedback=[praised]),
        kit.episode("broken", ("Where is it?", BROKEN[0])),
    ]
    turn = made[2].turns[0].model_copy(update={"tools": (failed,)})
    made[2] = made[2].model_copy(update={"turns": (turn,)})
    outputs = [one for record in kit.records(*made) for one in handler.handle(state, record, 0.0)]
    outputs += handler.flush(state, 0.0)
    scores = {score.episode: score for score in kit.decoded(Score, outputs, "scores")}
    assert {name: score.mask for name, score in scores.items()} == dict.fromkeys(("empty", "praised", "broken"), True)
    assert scores["empty"].reward == scores["broken"].reward == pytest.approx(-1.0)
    assert scores["praised"].reward < 0


def test_what_may_have_been_cut_or_can_be_read_is_no_broken_call():
    whole = '{"name": "respond", "arguments": {"text": "'
    assert not broken_call(f"{whole}{'x' * ANSWER_CHARS}")
    assert not worthless(Example("p", f'{whole}hello"}}}}'))
    assert not worthless(Example("p", "Write {name} here: {"))

"""Feedback to preferences: ordered pairs of answers to one prompt.

Two sources: somebody said that one answer is better than another, or gave the better answer itself (a
correction), which is then preferred to what the policy had said.
"""

from __future__ import annotations

from everloop.episode import Episode, Turn
from everloop.event import Call, Message
from everloop.feedback import Feedback, FeedbackKind, Preference

from pipelines.holdout import user_texts
from reward.features import answer_text


def asked(call: Call) -> str:
    """What was asked in a call: the last words of the user in its prompt; empty where there are none."""
    texts = user_texts(call.messages)
    return texts[-1] if texts else ""


def preferences(episode: Episode) -> tuple[Preference, ...]:
    """The pairs of an episode, in turn order and each once.

    A correction of the episode as a whole is one of its last answer.
    """
    pairs = [pair for turn in episode.turns for word in turn.feedback if (pair := _pair(episode, turn, word))]
    if episode.judged is not None:
        last = episode.turns[episode.judged]
        pairs += [pair for word in episode.feedback if (pair := _pair(episode, last, word))]
    return tuple(dict.fromkeys(pairs))


def _given(output: Message) -> str:
    """The answer as one text; whole where it is words alone, in the reward model's form where it calls tools."""
    return answer_text(output) if output.tool_calls else output.text


def _pair(episode: Episode, turn: Turn, word: Feedback) -> Preference | None:
    if word.kind is FeedbackKind.PREFERENCE:
        chosen, rejected = word.chosen or "", word.rejected or ""
    elif word.kind is FeedbackKind.CORRECTION:
        chosen, rejected = word.text or "", _given(turn.call.output)
    else:
        return None
    if chosen == rejected or not chosen:
        return None
    return Preference(
        episode=episode.id,
        call=turn.call.id,
        prompt=asked(turn.call),
        chosen=chosen,
        rejected=rejected,
        source=word.kind,
        rater=word.rater,
    )

"""Ids: made and checked without a database; one value has one text; nobody's and another's are told apart."""

from __future__ import annotations

import base64

import pytest
from everloop.capture.words import call_id
from everloop.ids import OBJECT, RESPONSE, Ids, _raw, _text
from hypothesis import given
from hypothesis import strategies as st

IDS = Ids(b"s" * 32)


@given(raw=st.binary(min_size=1, max_size=40))
def test_bytes_come_back_from_their_text_and_from_no_other(raw: bytes) -> None:
    text = _text(raw)
    assert text == base64.b32encode(raw).decode().rstrip("=").lower()
    assert _raw(text) == raw
    for other in (text.upper(), " " + text, text[:-1] + "!", text.replace(text[0], "_")):
        if other != text:
            with pytest.raises(ValueError, match="not an id"):
                _raw(other)


@pytest.mark.parametrize("text", ["", "a", "b7", "a_aaaaaa", "+aaaaaaa", "-aaaaaaa", "é", "\udcff"])
def test_what_is_no_text_of_any_bytes_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not an id"):
        _raw(text)


@pytest.mark.parametrize("prefix", [RESPONSE, OBJECT])
def test_a_response_id_says_whose_episode_and_call_it_is(prefix: str) -> None:
    episode = IDS.new_episode("bank")
    response = IDS.response("bank", episode, b"12345678", prefix)
    assert response.startswith(prefix)
    assert call_id(response) == Ids.call_of(response)
    assert IDS.parse_response("bank", response) == (episode, Ids.call_of(response))
    for tenant, ids in (("airline", IDS), ("bank", Ids(b"t" * 32))):
        with pytest.raises(ValueError, match="no such response"):
            ids.parse_response(tenant, response)
    with pytest.raises(ValueError, match="no such response"):
        IDS.parse_response("bank", response[:-1] + "b")


def test_an_episode_is_the_tenants_own_by_id_and_by_name() -> None:
    episode = IDS.new_episode("bank")
    assert IDS.episode_named("bank", episode) == episode
    assert IDS.episode_named("bank", "run-1") == IDS.episode_named("bank", "run-1")
    assert IDS.episode_named("bank", "run-1") != IDS.episode_named("airline", "run-1")
    for tenant, name in (("airline", episode), ("bank", "ep_made-up"), ("bank", "ep_")):
        with pytest.raises(ValueError, match="no such episode"):
            IDS.episode_named(tenant, name)
    assert IDS.pseudonym("bank", "subject", "anna") != IDS.pseudonym("bank", "rater", "anna")

"""The packaged encoder: the same bits whatever stands beside a text, equal to sentence-transformers, bounded."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
from everloop.errors import ConfigError

from reward import bert, encoder
from reward.encoder import Encoder, SentenceTransformers, folder_of

TEXTS = [
    "Where is my card?",
    "My card has not arrived.",
    "card_arrival",
    "I was charged twice for the same thing at a shop yesterday, why is that?",
    "",
    "long " * 500,
    "Ünïcode \ud800 half",
    *(f"Message number {i} about an exchange rate" for i in range(80)),
]


@pytest.fixture(scope="module")
def minilm():
    return Encoder(threads=1)


@pytest.mark.models
def test_a_text_has_the_same_bits_alone_and_in_company(minilm):
    together = minilm.encode(TEXTS)
    for i, text in enumerate(TEXTS[:10]):
        assert np.array_equal(Encoder.encode(fresh(minilm), [text])[0], together[i])
    assert np.array_equal(fresh(minilm).encode(TEXTS[::-1])[::-1], together)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)


def fresh(like):
    """Another encoder with the same network and nothing remembered."""
    made = Encoder(threads=1)
    made._network = like._network
    return made


@pytest.mark.models
def test_its_own_forward_is_that_of_sentence_transformers():
    import torch

    folder = folder_of("minilm")
    assert bert.fits(folder)
    ours, theirs = bert.Bert(folder, torch.float32, 128), SentenceTransformers(folder, "float32")
    for text in TEXTS[:6]:
        ids = ours.token_ids([text])
        assert ids == theirs.token_ids([text])
        mine = torch.nn.functional.normalize(ours.vectors(torch.tensor(ids)), dim=1)
        with torch.inference_mode():
            torch.testing.assert_close(mine, theirs.vectors(torch.tensor(ids)), atol=2e-6, rtol=0)


@pytest.mark.models
def test_each_arithmetic_is_at_hand_and_tells_itself_apart(minilm):
    (other,) = minilm.others
    assert {minilm.arithmetic, other.arithmetic} == set(encoder.PRECISIONS)
    assert other.version != minilm.version
    assert other.others == [minilm]
    assert minilm.others[0] is other
    assert (minilm.encode(["where is my card"]) @ other.encode(["where is my card"]).T).item() > 0.99


@pytest.mark.models
def test_near_texts_are_near(minilm):
    card, arrived, topic, charged = minilm.encode(TEXTS[:4])
    assert card @ arrived > card @ charged
    assert card @ topic > charged @ topic


@pytest.mark.models
def test_what_is_remembered_is_not_computed_again_and_is_bounded(minilm):
    small = Encoder(remember=3, threads=1)
    small._network = minilm._network or minilm._load()
    small.encode(["a", "b", "a"])
    assert small.encoded == 2
    small.encode(["a", "c", "d"])
    assert small.encoded == 4
    small.encode(["a"])
    assert small.encoded == 4, "it was used last"
    assert np.array_equal(small.encode(["b", "a", "c", "d", "e"])[1], small.encode(["a"])[0])
    assert len(small._known) == 3


@pytest.mark.models
def test_the_version_is_that_of_the_files(minilm, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder_of("minilm"), copy)
    other = Encoder(str(copy), threads=1)
    assert other.version == minilm.version
    tokenizer = copy / "tokenizer_config.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    assert Encoder(str(copy), threads=1).version != minilm.version


def test_an_encoder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"modules\.json"):
        Encoder(str(tmp_path))


@pytest.mark.models
def test_it_needs_neither_transformers_nor_sentence_transformers():
    program = (
        "import sys; from reward.encoder import Encoder; Encoder(threads=1).encode(['x']); "
        "sys.exit(any(name in sys.modules for name in ('transformers', 'sentence_transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=120).returncode == 0

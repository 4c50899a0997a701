"""The model as a whole: it learns, knows when to be silent, is the same again, and cannot be fooled cheaply."""

import json
import tracemalloc

import numpy as np
import pytest
from everloop.config import RewardConfig
from everloop.errors import ContractError

from reward import durable, snapshot
from reward.features import Example
from reward.model import MIN_LABELS, Label, Pair, RewardModel, opinion

THINGS = ("card", "loan", "rate", "pin", "app", "fee")


def labels(count, seed=0, flips=0.05):
    """Ratings of an agent with one answer a thing, right when it names the thing that was asked about."""
    random = np.random.default_rng(seed)
    found = []
    for i in range(count):
        asked, answered = random.choice(THINGS, 2) if random.random() < 0.7 else (random.choice(THINGS),) * 2
        right = float(asked == answered)
        said = 1 - right if random.random() < flips else right
        prompt = f"{asked} {random.choice(['my', 'the', 'where'])} {random.integers(40)}"
        found.append((Label(f"l{seed}-{i}", Example(prompt, f"{answered} desk"), said), right))
    return found


@pytest.fixture
def model(words):
    return RewardModel(RewardConfig(), words)


@pytest.fixture(scope="module")
def taught(words):
    model = RewardModel(RewardConfig(), words)
    model.learn([label for label, _ in labels(600)])
    return model


def best(model, prompt, answers):
    rewards = [one.reward for one in model.estimate([Example(prompt, answer) for answer in answers])]
    return answers[int(np.argmax(rewards))]


def test_it_learns_which_answer_is_right(taught):
    answers = [f"{thing} desk" for thing in THINGS]
    assert all(best(taught, f"{thing} today", answers) == f"{thing} desk" for thing in THINGS)
    assert taught.calibration.auc > 0.85
    assert taught.calibration.error < 0.08


def test_it_has_no_opinion_before_it_has_learned_enough(model):
    example = Example("card", "card desk")
    assert model.estimate([example])[0].mask is False
    for i in range(MIN_LABELS):
        model.learn([Label(f"up{i}", example, 1.0)])
    assert model.estimate([example])[0].mask is False, "labels of one kind teach no difference"
    for i in range(5):
        model.learn([Label(f"down{i}", Example("card", "loan desk"), 0.0)])
    assert model.estimate([example])[0].mask is True


def test_members_that_contradict_each_other_are_masked():
    torn = opinion((8.0, -8.0, 8.0, -8.0), 0.5, True)
    assert torn.mask is False
    assert torn.reward == pytest.approx(-0.5, abs=0.01)


def test_what_is_not_finite_is_masked_and_never_learned(model, words):
    assert opinion((float("nan"), 0.0), 0.5, True).mask is False
    assert opinion((float("nan"), 0.0), 0.5, True).reward == 0
    before = snapshot.version_of(model)
    model.learn([Label("a", Example("card", "card desk"), float("nan"))])

    class Broken(type(words)):
        def encode(self, texts):
            return np.full((len(texts), 48), np.nan, np.float32)

    model.encoder = Broken()
    model.learn([Label("b", Example("card", "card desk"), 1.0), Pair("c", "card", "card desk", "loan desk")])
    assert not any(one.mask for one in model.estimate([Example("card", "card desk")]))
    model.encoder = words
    assert (model.refused, model.updates, snapshot.version_of(model)) == (3, 0, before)


def test_pairs_alone_teach_an_order(model):
    for i in range(120):
        thing, other = THINGS[i % 6], THINGS[(i + 1 + i // 6) % 6]
        if thing != other:
            model.learn([Pair(f"p{i}", f"{thing} {i}", f"{thing} desk", f"{other} desk")])
    expected = model.learn([Pair("last", "fee now", "fee desk", "app desk")])[0]
    assert expected > 0.8
    assert best(model, "loan now", ["fee desk", "loan desk", "pin desk"]) == "loan desk"


def test_of_a_pair_as_of_a_label_nothing_is_expected_from_how_an_answer_looks(letters):
    model = RewardModel(RewardConfig(), letters)
    for i in range(60):
        thing = THINGS[i % 6]
        model.learn([Pair(f"p{i}", f"{thing} {i}", f"{thing} desk!!!", f"{thing} desk, {i}")])
    alike = Pair("last", "zebra", "zoo!!!", "zoo")  # to this encoder the same letters, so they differ in style alone
    assert model.foretell(alike) == pytest.approx(0.5, abs=1e-6)
    assert model.learn([alike])[0] == pytest.approx(0.5, abs=1e-6)


def test_the_first_label_of_a_new_topic_calibrates_that_topic(letters):
    model = RewardModel(RewardConfig(), letters)
    known = model.calibration.shares.known
    model.learn([Label("a", Example("aaa", "bbb"), 1.0)])
    first = known[0].copy()
    model.learn([Label("b", Example("zzz", "bbb"), 1.0)])
    assert len(model.topics.centres) == 2
    assert np.array_equal(known[0], first)
    assert known[1].any()


def test_a_correction_puts_the_better_answer_first_at_once(words):
    model = RewardModel(RewardConfig(), words)
    model.learn([label for label, _ in labels(200)])
    prompt, given, better = "zebra crossing", "card desk", "zoo keeper"
    model.learn(
        [Label("x", Example(prompt, given), 0.0, certain=True), Pair("y", prompt, better, given, absolute=True)]
    )
    assert best(model, prompt, [given, better]) == better


def test_the_same_labels_give_the_same_version_and_others_do_not(words):
    def version(items, **config):
        model = RewardModel(RewardConfig(**config), words)
        model.learn([label for label, _ in items])
        return snapshot.version_of(model)

    assert version(labels(150)) == version(labels(150))
    others = {version(labels(150)[:-1]), version(labels(150, seed=1)), version(labels(150), pessimism=0.6)}
    assert len(others | {version(labels(150))}) == 4


def test_offsets_and_encoder_are_part_of_the_version(model, words):
    before = snapshot.version_of(model)
    model.offsets["episodes/0"] = 7
    after = snapshot.version_of(model)

    class Other(type(words)):
        version = "words-2"

    model.encoder = Other()
    assert len({before, after, snapshot.version_of(model)}) == 3


def test_a_snapshot_scores_as_the_live_model_did(taught, words, tmp_path):
    version = taught.save(tmp_path)
    loaded = RewardModel.load(tmp_path / version, words)
    examples = [label.example for label, _ in labels(100, seed=3)] + [Example("new words", "never seen")]
    assert loaded.estimate(examples) == taught.estimate(examples)
    assert taught.save(tmp_path) == version
    assert [folder.name for folder in tmp_path.iterdir()] == [version]


def test_old_snapshots_go(model, tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot, "KEPT", 3)
    versions = []
    for i in range(6):
        model.offsets["episodes/0"] = i
        versions.append(model.save(tmp_path))
    assert {folder.name for folder in tmp_path.iterdir()} == set(versions[-3:])


@pytest.mark.parametrize("damage", ["cut", "gone", "edited", "poisoned"])
def test_a_damaged_snapshot_is_refused(taught, words, tmp_path, damage):
    folder = tmp_path / taught.save(tmp_path)
    weights, facts = folder / "model.safetensors", folder / "model.json"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "gone":
        facts.unlink()
    elif damage == "edited":
        facts.write_text(json.dumps({**json.loads(facts.read_text()), "curve": [9.0, 0.0, 0.0]}))
    else:
        content = bytearray(weights.read_bytes())
        content[-4:] = np.array([np.nan], "<f4").tobytes()
        weights.write_bytes(content)
    with pytest.raises(ContractError, match=folder.name):
        RewardModel.load(folder, words)


def test_a_snapshot_of_another_encoder_is_refused(taught, words, tmp_path):
    class Other(type(words)):
        version = "words-2"

    with pytest.raises(ContractError, match="give the same one"):
        RewardModel.load(tmp_path / taught.save(tmp_path), Other())


def test_pieces_restore_the_model_to_the_bit_and_it_goes_on_the_same(words):
    config = RewardConfig(reservoir=64)
    live, state = RewardModel(config, words), {}
    for label, _ in labels(150):
        live.learn([label])
        state.update(durable.changes(live))
    back = RewardModel(config, words)
    assert durable.restore(back, sorted(state.items()))
    assert snapshot.version_of(back) == snapshot.version_of(live)
    for model in (live, back):
        model.learn([label for label, _ in labels(40, seed=5)])
    assert snapshot.version_of(back) == snapshot.version_of(live)
    assert dict(durable.changes(back))["core"] == dict(durable.changes(live))["core"]


def test_damaged_and_foreign_pieces_are_refused(words):
    live = RewardModel(RewardConfig(), words)
    live.learn([label for label, _ in labels(10)])
    state = dict(durable.changes(live))
    with pytest.raises(ContractError, match="damaged"):
        durable.restore(RewardModel(RewardConfig(), words), {**state, "core": state["core"][:-4]}.items())
    with pytest.raises(ContractError, match="another encoder or size"):
        durable.restore(RewardModel(RewardConfig(heads=3), words), state.items())


def gain_by_length(encoder):
    """How much more long answers are worth than short ones of the same content, where raters like long answers."""
    random = np.random.default_rng(0)
    model = RewardModel(RewardConfig(), encoder)
    for i in range(700):
        asked, answered = random.choice(THINGS, 2) if random.random() < 0.6 else (random.choice(THINGS),) * 2
        more = int(random.integers(0, 60))
        answer = " ".join([answered, "desk", *["well"] * more])
        likes = (0.75 if asked == answered else 0.25) + 0.006 * (more - 30)
        model.learn([Label(f"l{i}", Example(f"{asked} {i}", answer), float(random.random() < likes))])
    grid = [(asked, answered, more) for asked in THINGS for answered in THINGS for more in (2, 4, 6, 50, 54, 58)]
    shown = [Example(f"{asked} now", " ".join([one, "desk", *["well"] * more])) for asked, one, more in grid]
    value = np.array([estimate.value for estimate in model.estimate(shown)]).reshape(6, 6, 6)
    right = np.eye(6, dtype=bool)
    assert value[right].mean() > value[~right].mean() + 0.2
    return value[:, :, 3:].mean() - value[:, :, :3].mean()


def test_length_is_corrected_for(words, monkeypatch):
    class Attentive(type(words)):
        """Hears what an answer says, whatever words of no content stand around it."""

        def encode(self, texts):
            return super().encode([text.replace(" well", "") for text in texts])

    corrected = gain_by_length(Attentive())
    monkeypatch.setattr("reward.model.STYLE_IS_SCORED", True)
    as_rated = gain_by_length(Attentive())
    assert abs(corrected) < as_rated / 3
    assert as_rated > 0.06


def test_the_null_answer_never_wins(taught):
    for thing in THINGS:
        for nothing in ("", "  \n"):
            assert best(taught, f"{thing} now", [nothing, *(f"{one} desk" for one in THINGS)]) == f"{thing} desk"
    assert taught.estimate([Example("card", "")])[0].reward == pytest.approx(-1)


def test_a_constant_answer_does_not_win(words):
    """One answer given to everything, right for a sixth of it and rated as such."""
    model, random = RewardModel(RewardConfig(), words), np.random.default_rng(2)
    for i in range(600):
        asked = random.choice(THINGS)
        answered = "card" if random.random() < 0.6 else random.choice(THINGS)
        model.learn([Label(f"l{i}", Example(f"{asked} {i}", f"{answered} desk"), float(asked == answered))])
    answers = [f"{thing} desk" for thing in THINGS]
    wins = [best(model, f"{thing} {i}", answers) == "card desk" for thing in THINGS[1:] for i in range(1000, 1010)]
    assert np.mean(wins) < 0.05


def test_all_thumbs_up_is_no_ground_for_an_opinion(model):
    for i in range(200):
        model.learn([Label(f"l{i}", Example(f"{THINGS[i % 6]} {i}", f"{THINGS[i % 6]} desk"), 1.0)])
    assert model.calibration.auc is None
    assert model.estimate([Example("card", "loan desk")])[0].mask is False


def test_a_label_revised_a_hundred_times_counts_once(words):
    """What is summed is as if only the last had been said, and of what is replayed only the last has a weight."""
    there, straight = (RewardModel(RewardConfig(), words) for _ in range(2))
    for model in (there, straight):
        model.learn([label for label, _ in labels(40)])
    example = Example("card today", "loan desk")
    for number in range(100):
        said = Label(f"w{number}", example, float(number % 2), certain=True)
        there.learn([said])
        trace = there.trace
        if number < 99:
            there.take_back(said.id, example, trace)
    straight.learn([said])
    assert there.seen == straight.seen
    for name in ("good", "bad", "counts", "totals"):
        ours, theirs = getattr(there.prototypes, name), getattr(straight.prototypes, name)
        np.testing.assert_allclose(ours, theirs, atol=1e-3)
    weights = [sum(m.reservoir.lesson(slot).weight for slot in range(len(m.reservoir))) for m in (there, straight)]
    assert weights[0] == weights[1]


def test_memory_of_an_update_is_bounded(words):
    model = RewardModel(RewardConfig(reservoir=64, window=50), words)
    model.prototypes.capacity = 50
    one_of_a_kind = [Label(f"l{i}", Example(f"{i} a", f"{i} b"), float(i % 2)) for i in range(300)]
    words.encode([text for one in one_of_a_kind for text in (one.example.prompt, one.example.answer)])  # it remembers
    tracemalloc.start()
    model.learn(one_of_a_kind[:150])
    before, _ = tracemalloc.get_traced_memory()
    model.learn(one_of_a_kind[150:])
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < 30_000, "150 lessons and answers that were all kept would be 0.5 MB"
    assert len(model.prototypes.rows) == 50


def test_estimating_many_encodes_each_text_once(taught, words, monkeypatch):
    seen = []

    class Counting(type(words)):
        def encode(self, texts):
            seen.extend(texts)
            return super().encode(texts)

    monkeypatch.setattr(taught, "encoder", Counting())
    examples = [Example(f"{THINGS[i % 6]} {i // 8}", f"{THINGS[i % 5]} desk {i % 9}") for i in range(4000)]
    taught.estimate([examples[0]])  # an encoder that is new to the model reads the hollow sayings, once
    seen.clear()
    taught.estimate(examples)
    assert len(seen) == len({one.prompt for one in examples}) + len({one.answer for one in examples}) < 4000


def test_an_answer_that_only_says_back_is_worth_nothing(taught):
    asked = "please tell me where my new card is today"
    back, own = taught.estimate([Example(asked, asked.upper()), Example(asked, "card desk")])
    assert back.reward == pytest.approx(-1)
    assert own.reward > back.reward
    passage = " ".join(f"word{i}" for i in range(40))
    assert taught.estimate([Example(f"shorten: {passage}", passage[:60])])[0].reward > -1, "an extract may be right"


def test_a_topic_whose_raters_are_harsher_gets_a_line_of_its_own(words):
    random, model = np.random.default_rng(0), RewardModel(RewardConfig(), words)
    for i in range(1500):
        harsh = i % 2 == 0
        likes = 0.3 if harsh else 0.8
        model.calibration.add(0.0, 0.5, float(random.random() < likes), topic=int(harsh))
    mild, stern = (1 / (1 + np.exp(-model.calibration.line(0.0, topic))) for topic in (0, 1))
    assert mild - stern > 0.25
    assert stern < 1 / (1 + np.exp(-model.calibration.line(0.0))) < mild
    model.calibration.forget(100)
    assert len(model.calibration.pairs) == 100
    assert model.calibration.line(0.0, 0) == model.calibration.line(0.0, 1)


def test_a_head_that_is_not_finite_is_never_heard(words):
    model = RewardModel(RewardConfig(), words)
    model.learn([label for label, _ in labels(60)])
    model.heads.shared[2, 0] = np.nan
    (estimate,) = model.estimate([Example("card", "card desk")])
    assert (estimate.mask, estimate.reward) == (False, 0.0)
    before = model.updates
    model.learn([label for label, _ in labels(1, seed=9)])
    assert (model.refused, model.updates) == (1, before)

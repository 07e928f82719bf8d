"""Text: the released id layout, boxes as words, round trips."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizers_vq.sequences import det_to_string, string_to_det
from tokenizers_vq.sequences.boxes import read_boxes
from tokenizers_vq.text import FIRST_COORDINATE, UNK, TextTokenizer, train_text_tokenizer

WORDS = ["a", "large", "red", "metal", "cube", "left", "of", "small", "blue", "sphere", "behind"]
CORPUS = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))] * 3
NAMES = ["sphere", "cube", "traffic light"]
BINS = 64
TEXT = train_text_tokenizer(CORPUS, class_names=NAMES, bins=BINS)

boxes = st.lists(
    st.tuples(
        *[st.floats(0, 1, allow_nan=False)] * 4, st.sampled_from(NAMES), st.floats(0.6, 1)
    ),
    max_size=6,
)


def test_ids_follow_the_released_layout():
    ids = {token: TEXT.inner.token_to_id(token) for token in TEXT.inner.get_vocab()}
    assert [ids[t] for t in ("[PAD]", "[UNK]", "[SOS]", "[EOS]")] == [0, 1, 2, 3]
    assert (ids["[S_0]"], ids["[S_199]"]) == (4, 203)
    assert ids["v0=0"] == 204
    assert ids["v3=63"] == 204 + 4 * BINS - 1 == TEXT.coordinate_id(3, 63)
    assert [ids[n] for n in sorted(NAMES)] == [204 + 4 * BINS + i for i in range(3)]
    assert TEXT.bins == BINS
    assert TEXT.class_names == tuple(sorted(NAMES))


def test_released_bins_put_the_first_class_name_at_4204():
    text = train_text_tokenizer(["a dog"], class_names=["zebra", "airplane"], bins=1000)
    assert text.encode("airplane zebra") == [4204, 4205]


def test_class_names_are_the_same_token_in_captions_whatever_the_case():
    cube = TEXT.inner.token_to_id("cube")
    assert cube in TEXT.encode("A large CUBE behind")
    assert cube not in TEXT.encode("cubes")
    assert len(TEXT.encode("traffic light")) == 1


def test_training_twice_gives_the_same_bytes():
    again = train_text_tokenizer(reversed(CORPUS), class_names=reversed(NAMES), bins=BINS)
    assert again.to_bytes() == TEXT.to_bytes()


def test_saved_tokenizer_encodes_the_same(tmp_path):
    TEXT.save(tmp_path / "t.json")
    assert TextTokenizer.load(tmp_path / "t.json").encode("a red cube") == TEXT.encode("a red cube")


def test_too_small_vocabulary_is_refused_with_the_reserved_count():
    with pytest.raises(ValueError, match="reserved ids"):
        train_text_tokenizer(CORPUS, bins=1000, vocab_size=100)


@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=20))
def test_captions_of_known_words_round_trip(words):
    caption = " ".join(words)
    assert TEXT.decode(TEXT.encode(caption)) == caption


@settings(deadline=None)
@given(boxes)
def test_boxes_survive_ids_up_to_half_a_bin(rows):
    instances = [
        {"box": [min(a, c), min(b, d), max(a, c), max(b, d)], "class_name": name, "score": score}
        for a, b, c, d, name, score in rows
    ]
    line = det_to_string(instances, bins=BINS)
    decoded = TEXT.decode(TEXT.encode(line))
    assert decoded == line
    back = string_to_det(decoded, bins=BINS)["instances"]
    kept = [i for i in instances if i["box"][2] > i["box"][0] and i["box"][3] > i["box"][1]]
    kept.sort(key=lambda i: i["box"][0] ** 2 + i["box"][1] ** 2)
    assert [i["class_name"] for i in back] == [i["class_name"] for i in kept]
    for ours, theirs in zip(back, kept, strict=True):
        for x, y in zip(ours["box"], theirs["box"], strict=True):
            assert abs(x - y) <= 0.5 / (BINS - 1) + 1e-9
    assert det_to_string(back, bins=BINS, min_score=0) == det_to_string(
        string_to_det(det_to_string(back, bins=BINS), bins=BINS)["instances"], bins=BINS
    )


def test_boxes_are_rounded_half_to_even_scored_and_sorted_by_their_corner():
    line = det_to_string(
        [
            {"box": [0.5, 0.5, 1, 1], "class_name": "cube", "score": 0.9},
            {"box": [0, 0, 0.5, 1.2], "class_name": "sphere", "score": 0.6},
            {"box": [0, 0, 1, 1], "class_name": "cube", "score": 0.59},
            {"box": [1, 0, 1.5, 1], "class_name": "cube", "score": 1},
        ],
        bins=2,
    )
    assert line == "v0=0 v1=0 v2=0 v3=1 sphere v0=0 v1=0 v2=1 v3=1 cube"


@given(st.text(alphabet=st.sampled_from(list("v0123= [EOS]cube")), max_size=80))
def test_any_text_is_read_without_an_error(text):
    for instance in string_to_det(text)["instances"]:
        assert all(0 <= c <= 1 for c in instance["box"])


def test_incomplete_and_inverted_boxes_are_passed_over():
    text = (
        "v0=1 v1=2 v0=0 v1=0 v2=9 v3=9 traffic light v0=5 v1=5 v2=1 v3=9 cube "
        "v0=0 v1=0 v2=99 v3=3 cube [EOS] v0=3 v1"
    )
    got = string_to_det(text, bins=10)["instances"]
    assert [(i["box"], i["class_name"]) for i in got] == [
        ([0, 0, 1, 1], "traffic light"),
        ([0, 0, 1, pytest.approx(1 / 3)], "cube"),
    ]


HOSTILE = ["[EOS]", "[PAD]", "[S_1]", "[UNK]", "v0=3", "V2=1 v3=2 ", "v3=7 v0=1", "cat\ndog",
           "\ud800x"]
NOTHING = ["", "  ", "\x00", "\ufffd", "\u0301", "\ud800", "\u202e"]


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_class_name_is_ordinary_text_whatever_it_spells(name, known):
    names = ["cube", name] if known else ["cube"]
    text = train_text_tokenizer(["a cat [ eos ] v = 1 dog x ?"], class_names=names, bins=9)
    first, second = [0.125, 0.25, 0.5, 1.0], [0.5, 0.5, 1.0, 1.0]
    line = det_to_string([{"box": first, "class_name": name},
                          {"box": second, "class_name": "cube"}], bins=9)
    ids = text.encode(line)
    assert not set(ids) & set(range(FIRST_COORDINATE)) - {UNK}
    assert sum(FIRST_COORDINATE <= i < FIRST_COORDINATE + 4 * 9 for i in ids) == 8
    scored = read_boxes(ids, [1.0] * len(ids), text)
    for found in (scored, string_to_det(line, bins=9)["instances"]):
        assert [i["box"] for i in found] == [first, second]
        assert found[1]["class_name"] == "cube"
        assert found[0]["class_name"]
    if known:
        assert scored[0]["class_name"] in text.class_names


@pytest.mark.parametrize("name", NOTHING)
def test_a_class_without_a_letter_is_no_token_and_its_boxes_are_not_told(name):
    text = train_text_tokenizer(["a cube"], class_names=["cube", name], bins=9)
    assert text.class_names == ("cube",)
    box = [0.0, 0.0, 1.0, 1.0]
    line = det_to_string([{"box": box, "class_name": name}, {"box": box, "class_name": "cube"}],
                         bins=9)
    ids = text.encode(line)
    assert [i["class_name"] for i in read_boxes(ids, [1.0] * len(ids), text)] == ["cube"]


def test_a_text_tokenizer_with_a_token_that_no_text_can_end_is_refused():
    made = train_text_tokenizer(["a red cube"], class_names=["cube"], bins=3).to_bytes().decode()
    for name in ("\\u0000", "\\u0301"):
        odd = made.replace('"content":"cube"', f'"content":"{name}"')
        with pytest.raises(ValueError, match="holds no letter"):
            TextTokenizer.from_bytes(odd.encode())


@pytest.mark.parametrize("change", [b"", b"{}", b"[" * 100_000, b"\xff", b'{"model": null}'])
def test_what_is_no_text_tokenizer_is_refused(change):
    with pytest.raises(ValueError, match="not a text tokenizer"):
        TextTokenizer.from_bytes(change)


def test_a_text_tokenizer_that_cannot_write_an_unknown_word_is_refused():
    made = train_text_tokenizer(["a red cube"], bins=3, vocab_size=300).to_bytes()
    assert TextTokenizer.from_bytes(made).encode("red")
    with pytest.raises(ValueError, match="not a text tokenizer: WordPiece error"):
        TextTokenizer.from_bytes(made.replace(b'"unk_token":"[UNK]"', b'"unk_token":"[NO]"'))

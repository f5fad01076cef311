"""The file of answers: what is in it, and what a file that was cut off or is none becomes."""

import os
import signal
from pathlib import Path

import pytest

from bitwright.core.errors import OutputError
from bitwright.evaluation.answers import Answers

ME, OTHER = {"weights": "a"}, {"weights": "b"}
ASKED = ("1 + 1 =", " 2")


def test_an_answer_is_there_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "answers"
    with Answers(path, ME) as answers:
        key = answers.key("loglikelihood", ASKED)
        assert key not in answers
        answers.keep(key, (-0.1, True))
        answers.keep(answers.key("generate_until", ("é\n", {"until": ["\n"]})), "ü\ud800")
    with Answers(path, ME) as again:
        assert again[key] == [-0.1, True]
        assert again[again.key("generate_until", ("é\n", {"until": ["\n"]}))] == "ü\ud800"
        assert again.key("generate_until", ASKED) not in again
        assert again.key("loglikelihood", (ASKED[0], " 3")) not in again


def test_it_belongs_to_who_gave_it(tmp_path: Path) -> None:
    with Answers(tmp_path / "answers", ME) as answers:
        answers.keep(answers.key("loglikelihood", ASKED), 1)
    with Answers(tmp_path / "answers", OTHER) as answers:
        assert answers.key("loglikelihood", ASKED) not in answers


def test_wherever_it_is_cut_off_it_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "answers"
    with Answers(path, ME) as answers:
        keys = [answers.key("loglikelihood", (str(n),)) for n in range(3)]
        for number, key in enumerate(keys):
            answers.keep(key, number)
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for length in range(first, len(whole)):
        path.write_bytes(whole[:length])
        with Answers(path, ME) as answers:
            kept = [key for key in keys if key in answers]
            assert len(kept) == whole[:length].count(b"\n") - 1
            for number, key in enumerate(keys):
                answers.keep(key, number)
        with Answers(path, ME) as answers:
            assert [answers[key] for key in keys] == [0, 1, 2]


def test_a_file_torn_in_its_first_line_begins_anew(tmp_path: Path) -> None:
    (tmp_path / "answers").write_text('{"bitwright": "ans')
    with Answers(tmp_path / "answers", ME) as answers:
        answers.keep("key", 1)
    with Answers(tmp_path / "answers", ME) as answers:
        assert answers["key"] == 1


@pytest.mark.parametrize("content", [b"text", b"{}\n", b"\xff\n", b'{"bitwright": "answers"}\n[]\n', b"[]\n"])
def test_other_files_are_left_alone(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(OutputError, match="is no file of answers"):
        Answers(tmp_path / "file", ME)
    assert (tmp_path / "file").read_bytes() == content


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="answers cannot be kept there"):
        Answers(tmp_path / "file" / "answers", ME)
    with pytest.raises(OutputError, match="answers cannot be kept there"):
        Answers(tmp_path, ME)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "answers")
    signal.alarm(30)  # ends the tests rather than wait for ever
    with pytest.raises(OutputError, match="a named pipe"):
        Answers(tmp_path / "answers", ME)
    signal.alarm(0)

"""The model as lm-eval asks it: what was answered before is not asked again, and what is answered is kept at once."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from bitwright.core.progress import Listener, Progress
from bitwright.evaluation.answers import Answers


class Answerer(Protocol):
    """What is used of lm-eval's own model class."""

    max_length: int
    tok_encode: Callable[[str], list[int]]
    set_cache_hook: Callable[[Any], None]


class Answering:
    """Stands between lm-eval and its model; has the methods and attributes lm-eval asks of one.

    ``stage`` names the task in the progress; ``cut`` counts the prompts of each task that are
    longer than the model's context.
    """

    rank, world_size = 0, 1

    def __init__(self, lm: Answerer, answers: Answers, stage: str, listener: Listener) -> None:
        """``lm`` is asked, ``answers`` remember."""
        self._lm, self._answers, self._stage, self._listener = lm, answers, stage, listener
        self.cut: Counter[str] = Counter()

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether it is what the model would write) of each continuation."""
        longest = self._lm.max_length + 1  # the last token is predicted and not read
        for each in requests:
            self.cut[each.task_name] += len(self._lm.tok_encode("".join(each.args))) > longest
        return [(float(value), bool(greedy)) for value, greedy in self._answer("loglikelihood", requests)]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Log-likelihood in nats of each whole text, window by window."""
        return self._answer("loglikelihood_rolling", requests)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """What the model writes after each prompt."""
        for each in requests:
            room = self._lm.max_length - new_tokens(each.args[1])
            self.cut[each.task_name] += len(self._lm.tok_encode(each.args[0])) > room
        if any(each.args[1].get("do_sample") for each in requests):  # drawn anew each time: nothing to remember
            return self._ask("generate_until", requests, keep=False)
        return self._answer("generate_until", requests)

    def _answer(self, kind: str, requests: Sequence[Any]) -> list[Any]:
        keys = [self._answers.key(kind, each.args) for each in requests]
        missing = {key: each for key, each in zip(keys, requests, strict=True) if key not in self._answers}
        self._ask(kind, list(missing.values()), keep=True)
        return [self._answers[key] for key in keys]

    def _ask(self, kind: str, requests: list[Any] | Sequence[Any], keep: bool) -> list[Any]:
        if not requests:
            return []
        self._lm.set_cache_hook(_Hook(self._answers if keep else None, self._stage, len(requests), self._listener))
        found: list[Any] = getattr(self._lm, kind)(requests, disable_tqdm=True)
        return found


class _Hook:
    """lm-eval calls it with each answer as soon as it is there."""

    def __init__(self, answers: Answers | None, stage: str, total: int, listener: Listener) -> None:
        self._answers, self._stage, self._total, self._listener = answers, stage, total, listener
        self._done = 0
        listener(Progress(stage, 0, total, "answers"))

    def add_partial(self, kind: str, asked: tuple[Any, ...], answer: Any) -> None:
        if self._answers is not None:
            self._answers.keep(self._answers.key(kind, asked), answer)
        self._done += 1
        self._listener(Progress(self._stage, self._done, self._total, "answers"))


def new_tokens(settings: dict[str, Any], default: int = 256) -> int:
    """How many tokens a generation may take, under any of the names that lm-eval accepts; 256 where none is given."""
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    return next((int(settings[name]) for name in names if settings.get(name) is not None), default)

"""The format of a recipe that names engines: the first that all of them run and that takes the model.

``for_engines`` chooses it, before any work. The rest of this file is what is said if there is none: why, and what would
do: the nearest scheme that runs (``nearest_scheme.py``), flags of the method, another format, or several exports.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from bitwright.core.engine import Engine, Refusal, Way, Workload, engine_named, engines
from bitwright.core.errors import RecipeError
from bitwright.core.format import FileFormat
from bitwright.core.mixing import advised
from bitwright.prepare.engine_question import EngineQuestion, formats_of
from bitwright.prepare.format_choice import HOLDS_ALL, is_single, target
from bitwright.prepare.nearest_scheme import nearest_first
from bitwright.prepare.question import Question

TABLE = "bitwright engines shows the table"
SHOWN = 3
"""Entries of an allocation that a message names."""


def for_engines(asked: Question, device: str = "auto") -> Question:
    """Settle the format of a recipe: the first that every engine it names runs, and that takes the model's linears.

    The format stays open if they all load the one that holds everything: then it is settled when the methods have
    decided, as it is without engines.

    Raises RecipeError if an engine is not known, does not run what is asked, or loads another format, and if the model
    does not fit into those that are loaded.
    """
    recipe = asked.recipe
    chosen = [engine_named(name) for name in recipe.patterns("engines")]
    if not chosen:
        raise RecipeError(f"engines names none; take {', '.join(engine.name for engine in engines())}, or leave it out")
    question = EngineQuestion.of(asked, device)
    for engine in chosen:
        _require_schemes(question, engine)
    if recipe.format is None and all(HOLDS_ALL in formats_of(question.running(engine)) for engine in chosen):
        return asked
    ways = [_mixing(question, engine) for engine in chosen]
    obstacles = dict[str, str]()
    for format, obstacle in question.obstacles(ways):
        if obstacle is None:
            return Question.of(replace(recipe, format=format))
        obstacles[format] = obstacle
    raise _does_not_fit(question, chosen, obstacles) if obstacles else _no_shared_format(question, chosen, ways)


def _require_schemes(question: EngineQuestion, engine: Engine) -> None:
    """Raise RecipeError if an engine does not load the named format, or if it runs a scheme in no way."""
    ways = question.ways(engine)
    if not ways:
        raise _not_loaded(engine, str(question.named))
    for workload in question.workload.uniform():
        if all(way.refusal(workload) for way in ways):
            exceptions = question.workload.exceptions.items()
            linear = next((name for name, scheme in exceptions if scheme == workload.scheme), None)
            raise _not_run(replace(question, workload=workload), engine, linear)


def _mixing(question: EngineQuestion, engine: Engine) -> list[Way]:
    """The ways in which an engine runs the model's linears beside each other. Raises RecipeError if there is none."""
    running, schemes = question.running(engine), question.model.schemes(question.workload)
    refused: dict[str, list[Way]] = {}
    for way in running:
        if (reason := way.refuses_mix(schemes)) is not None:
            reason += question.model.question.rules.replaced_by(advised(reason), question.model.inventory.linears)
            refused.setdefault(reason, []).append(way)
    if mixing := [way for way in running if not any(way in ways for ways in refused.values())]:
        return mixing
    mixed = " and ".join(str(workload.scheme) for workload in question.workload.uniform())
    why = "; ".join(f"in {' and '.join(formats_of(ways))} it does not run {why}" for why, ways in refused.items())
    raise RecipeError(
        f"{engine.name} cannot run {question.model.name} so{_asked_apart(question)}: "
        f"{why or f'no one format of it holds {mixed}'}; {TABLE}"
    )


def _asked_apart(question: EngineQuestion) -> str:
    """What gave linears schemes of their own, to go on in a message."""
    rules, linears = question.model.question.rules, question.workload.exceptions
    asked = list(dict.fromkeys(text for linear in linears if (text := rules.asked_for(linear)) is not None))
    more = f" and {len(asked) - SHOWN} more" if len(asked) > SHOWN else ""
    return f" ({', '.join(asked[:SHOWN])}{more})" if asked else ""


def _not_loaded(engine: Engine, format: str) -> RecipeError:
    """The error of a format that was named and that an engine does not load, or not by the table."""
    known = ", ".join(engine.formats)
    if format in engine.also:
        return RecipeError(
            f"{engine.name} loads format {format} {engine.also[format]}; what it runs of that is not in the table that "
            f"--engine asks. Leave --engine {engine.name} out, or take one of its other formats: {known}"
        )
    return RecipeError(f"{engine.name} does not load format {format}; it loads {known}. Leave --format out")


def _not_run(question: EngineQuestion, engine: Engine, linear: str | None) -> RecipeError:
    """The error of an engine that runs a scheme in none of its ways: in each format, the refusal that came last.

    ``linear`` is one that has this scheme, None if it is the scheme of all but exceptions.
    """
    furthest: dict[str, Refusal] = {}
    for way in question.ways(engine):
        refusal = way.refusal(question.workload)
        if refusal and (way.format not in furthest or refusal.check > furthest[way.format].check):
            furthest[way.format] = refusal
    why = "; ".join(f"in {format} it does not run {refusal.reason}" for format, refusal in furthest.items())
    asked = question.model.question.rules.asked_for(linear) if linear else None
    what = f"scheme {question.workload.scheme}{f' of {linear}' if linear else ''}{f' ({asked})' if asked else ''}"
    method = " with this method" if question.workload.outliers or question.workload.tiles else ""
    return RecipeError(
        f"{engine.name} cannot run {what}{method}: {why}. {_remedy(question, [engine])}"
        f"{_leave_format_out(question, engine)}; {TABLE}"
    )


def _does_not_fit(question: EngineQuestion, chosen: Sequence[Engine], obstacles: Mapping[str, str]) -> RecipeError:
    """The error of a model that goes into none of the formats that these engines have in common."""
    able = [engine for engine in chosen if question.named is None and HOLDS_ALL in formats_of(question.running(engine))]
    alone = f", or --engine {able[0].name} alone, in format {HOLDS_ALL}" if able else ""
    alone += _leave_format_out(question, chosen[0]) if len(chosen) == 1 else ""
    names, why = " and ".join(engine.name for engine in chosen), "; ".join(dict.fromkeys(obstacles.values()))
    return RecipeError(
        f"{names} cannot run {question.model.name} under scheme {question.workload.scheme}: what is loaded is format "
        f"{', '.join(obstacles)}, and {why}. {_remedy(question, chosen, obstacles.values())}{alone}; {TABLE}"
    )


def _no_shared_format(question: EngineQuestion, chosen: Sequence[Engine], ways: Sequence[Sequence[Way]]) -> RecipeError:
    """The error of engines without a format in common: how one run serves them all.

    Its result is in a format that ``export`` reads, an engine's own if there is one; exports serve the other engines.
    """
    fitting, loads = list[str](), list[str]()
    for engine, of_engine in zip(chosen, ways, strict=True):
        obstacles = dict(question.obstacles([of_engine]))
        fits = next((format for format, obstacle in obstacles.items() if obstacle is None), None)
        if fits is None:
            return _does_not_fit(question, [engine], {format: str(obstacle) for format, obstacle in obstacles.items()})
        fitting.append(fits)
        loads.append(f"{engine.name} {', '.join(formats_of(of_engine))}")
    first = next((at for at, format in enumerate(fitting) if not isinstance(target(format), FileFormat)), None)
    result, begin = HOLDS_ALL, f"--format {HOLDS_ALL} and no --engine"
    if first is not None:
        result, begin = fitting[first], f"--engine {chosen[first].name} alone"
    others = dict.fromkeys(
        format for at, format in enumerate(fitting) if at != first and result not in formats_of(ways[at])
    )
    exports = "; ".join(
        f"bitwright export OUTPUT --format {format} --output OTHER{'.gguf' if is_single(format) else f'-{format}'}"
        for format in others
    )
    return RecipeError(
        f"no one format of scheme {question.workload.scheme} is loaded by all of these engines ({'; '.join(loads)}). "
        f"Quantize with {begin}, and export the result for the other{'s' if len(others) > 1 else ''}: {exports}"
    )


def _leave_format_out(question: EngineQuestion, engine: Engine) -> str:
    """The advice to leave --format out, if the engine runs the workload in another format; "" if it does not."""
    if question.named is None:
        return ""
    question = replace(question, named=None)
    fits = [format for format, obstacle in question.obstacles([question.running(engine)]) if obstacle is None]
    return f", or leave --format out: {engine.name} runs {question.workload.scheme} in {fits[0]}" if fits else ""


def _remedy(question: EngineQuestion, chosen: Sequence[Engine], known: Collection[str] = ()) -> str:
    """What to try: the nearest scheme, and the flags that keep the method from asking for more than that.

    ``known`` are obstacles that the message has named already.
    """
    nearest = _nearest(question, chosen)
    if nearest is None:
        return "No scheme helps"
    near, obstacle = nearest
    scheme, workload = near.workload.scheme, question.workload
    if obstacle is not None:
        return "No scheme helps" + ("" if obstacle in known else f": the nearest would be {scheme}, and {obstacle}")
    running = [near.running(engine) for engine in chosen]
    flags = list[str]()
    if workload.outliers and not all(any(way.outliers for way in ways) for ways in running):
        flags.append("--outliers 0")
    if workload.tiles and not all(any(way.per_input for way in ways) for ways in running):
        flags.append("--axis oc")
    runs = "it runs" if len(chosen) == 1 else "they run"
    same = scheme == workload.scheme
    remedy = f"{runs.capitalize()} this scheme" if same else f"The nearest scheme that {runs} is {scheme}"
    return f"{remedy} with {' '.join(flags)}" if flags else remedy


def _nearest(question: EngineQuestion, chosen: Sequence[Engine]) -> tuple[EngineQuestion, str | None] | None:
    """The question whose scheme is most like this one's, of those that pass, and None.

    A scheme passes if all engines run it, without outliers and in its own tiles, in a format that takes the model. If
    no scheme passes: the nearest that they run, and what keeps the model out. None if they run no scheme at all.
    """
    first = None
    sizes = {size for engine in chosen for way in question.ways(engine) for size in way.groups or way.multiples}
    for scheme in nearest_first(question.workload.scheme, sizes):
        near = replace(question, workload=Workload(scheme, question.workload.model_type))
        for _, obstacle in near.obstacles([near.running(engine) for engine in chosen]):
            if obstacle is None:
                return near, None
            first = first or (near, obstacle)
    return first

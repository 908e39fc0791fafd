"""``kvcli calibrate``: from a model to an artifact."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from kvcli.cli.console import emit, progress, say
from kvcli.cli.options import JsonFlag, SeedOption, TaskData, TaskItems, ThreadsOption, TrustRemoteCode, option
from kvcli.cli.shared import plan_summary, show_plan
from kvcli.errors import UsageError

TOKENS = 8192  # of calibration text, without predictors
WINDOW = 1024  # longest calibration window


def calibrate(
    model: Annotated[str, typer.Argument(help="A local folder, a hub id or a .gguf file.")],
    out: Annotated[Path, option("--out", "-o", help="Folder of the artifact.")],
    bits: Annotated[
        float | None,
        option("--bits", help="Ceiling on effective bits per cached value at --context; a preset is only held to it."),
    ] = None,
    context: Annotated[
        int,
        option(
            "--context",
            min=0,
            help="Tokens of one sequence at which bits are counted.",
            show_default="model's, at most 8192",
        ),
    ] = 0,
    nominal: Annotated[
        bool, option("--nominal", help="Make --bits a ceiling on nominal bits, as papers count.")
    ] = False,
    data: Annotated[
        str,
        option(
            "--data",
            help="Calibration text: builtin[:NAME], a .txt or .jsonl file, - (stdin), self or hub:NAME; commas mix.",
        ),
    ] = "builtin",
    tokens: Annotated[
        int | None,
        option("--tokens", min=2, help="Tokens of calibration text.", show_default="8192; 32768 with predictors"),
    ] = None,
    recipe: Annotated[
        str,
        option(
            "--recipe",
            help="A shipped recipe, a YAML file, a quantizer plug-in, or a preset that leaves nothing to search: "
            "kvtuner:NAME or kvtuner:FILE.yaml[:kivi|token].",
        ),
    ] = "balanced",
    search: Annotated[
        Literal["surrogate", "kvtuner-nsga2", "kvtuner-moead"],
        option("--search", help="How plans are found: by kvcli's surrogate, or by KVTuner's multi-objective search."),
    ] = "surrogate",
    trials: Annotated[int, option("--trials", min=1, help="Plans that KVTuner's search tries.")] = 200,
    objective: Annotated[
        str,
        option(
            "--objective",
            metavar="kl|task:NAME",
            help="What KVTuner's search weighs against bits: KL, or the errors on a task of kvcli eval.",
        ),
    ] = "kl",
    task_items: TaskItems = 24,
    task_data: TaskData = None,
    transforms: Annotated[
        Literal["recipe", "learned", "none"],
        option("--transforms", help="Learn transforms and fuse them: as the recipe says, with the defaults, or not."),
    ] = "recipe",
    weights: Annotated[
        Literal["recipe", "none", "int3", "int4", "int8", "nf4", "llm-int8"],
        option(
            "--weights",
            help="Store linear layers in AutoGPTQ's layout (int3, int4, int8) or bitsandbytes': as the recipe says, or "
            "so.",
        ),
    ] = "recipe",
    weight_method: Annotated[
        Literal["rtn", "precalibrated", "gptq", "precalibrated+gptq"] | None,
        option(
            "--weight-method",
            help="How int3, int4 and int8 weights are chosen; gptq reads the calibration text.",
            show_default="precalibrated+gptq",
        ),
    ] = None,
    weight_symmetric: Annotated[
        bool,
        option("--weight-symmetric", help="Keep zero points of int weights in the middle: vLLM reads no others."),
    ] = False,
    adapters: Annotated[
        Literal["recipe", "none", "absorbed", "always", "capacity"],
        option(
            "--adapters",
            help="Predict values from their keys, or all from the layers before, and store what is left: as the recipe "
            "says, or so; capacity does the latter for idle sequences alone.",
        ),
    ] = "recipe",
    capacity_bits: Annotated[
        float | None,
        option(
            "--capacity-bits",
            help="Ceiling on effective bits at --context of idle sequences, with --adapters capacity.",
            show_default="2.5, or the least that can be reached",
        ),
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16", "float64"],
        option("--dtype", help="Dtype the model computes in; auto is the checkpoint's own, and float32 for .gguf."),
    ] = "auto",
    seed: SeedOption = 0,
    resume: Annotated[
        bool, option("--resume/--fresh", help="Take finished stages of an interrupted run, or forget them.")
    ] = True,
    force: Annotated[bool, option("--force", help="Replace an artifact that is already there.")] = False,
    dry_run: Annotated[bool, option("--dry-run", help="Check everything, say what would be done, and stop.")] = False,
    threads: ThreadsOption = 0,
    ray: Annotated[
        str | None,
        option(
            "--ray", metavar="auto|ADDRESS", help="Measure on the workers of a Ray cluster; auto may start one here."
        ),
    ] = None,
    workers: Annotated[
        int, option("--workers", min=0, help="Ray workers, of --threads each.", show_default="all CPUs of the cluster")
    ] = 0,
    device_map: Annotated[
        Literal["none", "auto", "balanced", "sequential"],
        option("--device-map", help="How accelerate spreads a model that is larger than one device."),
    ] = "none",
    trust_remote_code: TrustRemoteCode = False,
    json: JsonFlag = False,
) -> None:
    """Find how each layer's keys and values are best stored within a bit budget, and write the artifact.

    Finished stages of an interrupted run are kept beside the output and taken up again. The same seed gives the same
    plan.

    Raises
    ------
    BudgetError
        If the budget cannot be met.
    """
    from kvcli.artifact.writer import check_target
    from kvcli.calibration import (
        adapting,
        capacity,
        corpora,
        fixed,
        pipeline,
        presets,
        quantized_weights,
        transforming,
    )
    from kvcli.calibration.learn_settings import LEAST, LearnSettings
    from kvcli.calibration.objectives import TaskObjective, task_name
    from kvcli.calibration.space import load_recipe
    from kvcli.calibration.stages import in_turn
    from kvcli.calibration.workers import ModelSource, RayPool, check_ray
    from kvcli.models.loading import load

    check_target(out, overwrite=force)
    preset = presets.load(recipe) if presets.is_preset(recipe) else None
    if bits is None and preset is None:
        raise UsageError("--bits is missing: only a preset (--recipe kvtuner:NAME) is a plan without a budget.")
    if preset is not None and search != "surrogate":
        raise UsageError("--search is for recipes: a preset leaves nothing to search.")
    task = task_name(objective, others=("kl",))
    if task and search == "surrogate":
        raise UsageError(f"--objective {objective} is for --search kvtuner-…; or choose by it in kvcli solve --verify.")
    if workers and ray is None:
        raise UsageError("--workers are Ray's: give --ray auto or --ray ADDRESS too.")
    if weights == "recipe":
        stored = None if preset is not None else quantized_weights.WeightSettings.of_recipe(recipe)
    else:
        stored = None if weights == "none" else quantized_weights.WeightSettings(weights)
    if stored is not None:
        stored = replace(stored, method=weight_method or stored.method, symmetric=weight_symmetric or stored.symmetric)
    elif weight_method is not None or weight_symmetric:
        raise UsageError("--weight-method and --weight-symmetric say how weights are stored: give --weights too.")
    if ray is not None and stored is not None:
        raise UsageError("Ray's workers load the model anew: first --weights alone, then --ray on what it wrote.")
    if preset is not None and transforms == "learned":
        raise UsageError("--transforms learned is for recipes: a preset is taken as it was published.")
    learn = None if transforms == "none" or preset is not None else LearnSettings.of_recipe(recipe)
    if transforms == "learned" and (learn is None or not learn.steps):
        learn = LearnSettings.for_space(load_recipe(recipe))
    elsewhere = ray is not None or device_map != "none"
    if learn is not None and elsewhere and learn.steps:
        raise UsageError("Transforms are learned here, on a model in memory: give --transforms none, or no --ray.")
    if ray is not None:
        check_ray(ray)
    predicted = adapting.AdapterSettings() if preset is not None else adapting.AdapterSettings.of_recipe(recipe)
    if adapters != "recipe":
        predicted = replace(predicted, mode=adapters, reason="asked for by --adapters")
    if capacity_bits is not None:
        predicted = replace(predicted, capacity_bits=pipeline.Budget(capacity_bits, 1).bits)
        if predicted.mode != "capacity":
            raise UsageError("--capacity-bits are for idle sequences: give --adapters capacity too.")
    if preset is not None and predicted.mode == "capacity":
        raise UsageError("--adapters capacity is for recipes: of a preset no layer is measured.")
    tokens = tokens or (TOKENS if predicted.mode == "none" else adapting.TOKENS)
    placement = ModelSource(model, dtype, trust_remote_code, None if device_map == "none" else device_map)
    with progress("loading the model"):
        loaded = load(**vars(placement))
    short = loaded.max_context < LEAST
    if learn is not None and not learn.steps and (elsewhere or short or transforming.is_quantized(loaded)):
        # the default must work on every model; what was asked for by name must not be left out in silence
        need = f"windows of {LEAST} tokens" if short else "unquantised weights in the memory of this process"
        say(f"Transforms are left out: they need {need}.")
        learn = None
    if learn is not None:
        learn = learn.shortened(min(WINDOW, loaded.max_context))
        transforming.check(loaded, learn)
        if learn.steps:  # closed forms make do with the text that is asked for
            tokens = max(tokens, learn.windows * learn.tokens)
    if stored is not None:
        quantized_weights.check(loaded, stored)
    context = context or min(loaded.max_context, 8192)
    geometry = pipeline.exact_layers(loaded)
    if preset is not None:
        budget = fixed.budget_for(loaded, preset, bits, context, nominal)
        plan = preset.plan(geometry, loaded.dtype)
        formats, settings = {"k": [x.k for x in plan.layers], "v": [x.v for x in plan.layers]}, 1
    else:
        budget = pipeline.Budget(bits or 0, context, nominal)
        space = pipeline.search_space(recipe, geometry)
        pipeline.check_budget(space, geometry, budget, loaded.dtype)
        capacity.check_bits(space, geometry, predicted, context, loaded.dtype)
        formats, settings = {"k": list(space.k), "v": list(space.v)}, len(list(space.settings()))
    length = min(WINDOW, loaded.max_context)
    if dry_run:
        corpora.sources(data, loaded, num_tokens=tokens, seed=seed, length=length)
        _say_plan(loaded, budget, formats, settings, recipe, data, tokens, json)
        return
    with progress("reading calibration text", total=100) as bar:
        last = 0.0

        def report(done: int, total: int) -> None:
            nonlocal last
            bar.advance(100 * done / max(1, total) - last)
            last = 100 * done / max(1, total)

        corpus = corpora.tokens(data, loaded, num_tokens=tokens, seed=seed, length=length, progress=report)
    fresh, about_weights, about_transforms, means = not resume, None, None, None
    ran: list[dict[str, Any]] = []
    if learn is not None:
        about_transforms, means, ran = transforming.apply(
            loaded, corpus, learn, out, seed=seed, fresh=fresh, show=progress
        )
        fresh = False  # earlier stages were forgotten just now
    if stored is not None:
        loaded, *about_weights = quantized_weights.quantize(loaded, corpus, stored, out, fresh=fresh, show=progress)
        fresh = False  # earlier stages were forgotten just now
    with ExitStack() as stack:
        run = in_turn
        if ray is not None:
            with progress("reaching the Ray cluster"):
                pool = RayPool(ray, loaded.model, placement, loaded.sha256, threads=threads, workers=workers)
            run = stack.enter_context(pool).run
        if preset is not None:
            found = fixed.calibrate(loaded, corpus, preset, budget, out, fresh=fresh, show=progress, run=run)
        else:
            found = pipeline.calibrate(
                loaded, corpus, budget, out, recipe=recipe, search=search, trials=trials,
                task=TaskObjective(task, task_items, seed, task_data) if task else None,
                seed=seed, means=means, fresh=fresh, show=progress, run=run,
            )  # fmt: skip
    # plans of presets and of KVTuner's search were asked for as they are
    fixed_plan = preset is not None or search != "surrogate"
    adapting.apply(loaded, corpus, found, predicted, fixed=fixed_plan, show=progress)
    capacity.apply(loaded, corpus, found, predicted, show=progress)
    reason = predicted.reason or "as the recipe or the preset says"
    found.report["mode"] = {"adapters": predicted.mode, "reason": reason}
    if found.stages.resumed:
        say(f"Resumed: {', '.join(found.stages.resumed)} taken from an earlier run.")
    if about_weights is not None:
        found.stages.record.insert(0, about_weights[0])
        found.report["weights"] = about_weights[1]
    if about_transforms is not None:
        found.stages.record[:0] = ran
        found.report["transforms"] = about_transforms
    with progress("writing the artifact"):
        path = pipeline.write(loaded, corpus, found, out, seed=seed, overwrite=force)
    chosen = found.report["verified"][found.report.get("chosen", 0)]
    second = found.capacity[0] if found.capacity else None
    if json:
        summary = plan_summary(found.plan, budget.context, second)
        emit({"path": str(path), **summary, "kl": chosen["kl"], "data": corpus.name})
        return
    show_plan(found.plan, budget.context, second)
    print(f"mean KL {chosen['kl']:.4f} on calibration text; measure on your own: kvcli eval {out} --data FILE")
    print(f"written to {out}")


def _say_plan(
    loaded: Any,
    budget: Any,
    formats: dict[str, list[Any]],
    settings: int,
    recipe: str,
    data: str,
    tokens: int,
    json: bool,
) -> None:
    facts = {
        "model": loaded.source, "dtype": loaded.dtype, "num_layers": len(loaded.geometry),
        "bits": budget.bits, "nominal": budget.nominal, "context": budget.context,
        "recipe": recipe, "data": data, "tokens": tokens,
        "formats": {which: list(dict.fromkeys(map(str, x))) for which, x in formats.items()},
        "settings": settings,
    }  # fmt: skip
    if json:
        emit(facts)
        return
    print(f"{facts['model']}: {facts['num_layers']} layers, computing in {facts['dtype']}")
    kind = "nominal" if budget.nominal else "effective"
    print(f"budget {budget.bits:g} {kind} bits at {budget.context} tokens: can be met")
    counts = {which: len(set(x)) for which, x in formats.items()}
    print(f"recipe {recipe}: {counts['k']} key and {counts['v']} value formats under {settings} settings")
    print(f"calibration text {data}, {tokens} tokens; nothing was written")

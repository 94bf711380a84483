"""Prints the tables of README.md and docs/ from the results that are kept in `benchmarks/results`, or writes them.

python benchmarks/tables.py           prints them
python benchmarks/tables.py --write   puts them where a page has <!-- results: NAME --> before a table
"""

import ast
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
from rich.table import Table

from hf_quest.evaluation.choices import parse_choice
from hf_quest.evaluation.commands import TABLES
from hf_quest.evaluation.compare_report import method_table
from hf_quest.evaluation.methods import Way
from hf_quest.evaluation.report import markdown
from hf_quest.evaluation.selection import means

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RESULTS = ROOT / "benchmarks" / "results"
# The pages of docs/methods/ and the methods of `hf-quest eval compare` that each is about.
METHODS = {
    "quest": ["quest", "quest-published", "quest-codes"],
    "h2o": ["h2o"],
    "tova": ["tova"],
    "streaming_llm": ["streamingllm"],
    "recycled_attention": ["recycled"],
    "token_select": ["tokenselect"],
    "squeezed_attention": ["squeezed"],
    "cascading": ["cascading"],
    "think": ["think"],
    "subgen": ["subgen"],
}
COMPARED = ("smollm2", "gemma3", "tiny")  # models, in the order of lines on those pages
SMALLEST_SECTION = 0.02  # share of a kernel's time
LONGEST_KERNELS = 10  # that a table of a step has
LONGEST_NAME = 90  # characters
STOCK = ("stock", "flash")  # ways to read a prompt without QuestCache


def decode_table(report):
    """ms per token at every length of context and for every way, with the speedup over the first."""
    table = Table("tokens", *(result["way"] for result in report["contexts"][0]["results"]))
    for context in report["contexts"]:
        stock_ms = context["results"][0]["ms_per_token"]
        cells = [f"{r['ms_per_token']:.1f} ({stock_ms / r['ms_per_token']:.1f}×)" for r in context["results"]]
        table.add_row(f"{context['context']:,}", *cells)
    return table


def stages_table(report):
    """µs per layer of a decode step's stages, and of the three that are Quest's attention beside the best dense one."""
    table = Table("B, Hq, Hkv", "tokens", "append", "estimate", "select", "attend", "Quest", "dense", "speedup")
    for case in report["cases"]:
        microseconds = [case["stages"][name]["us"] for name in ("append", "estimate", "select", "attend", "chain")]
        microseconds.append(case["speedup"] * microseconds[-1])
        heads = f"{case['batch_size']}, {case['num_heads']}, {case['num_kv_heads']}"
        table.add_row(heads, f"{case['context']:,}", *(f"{us:.1f}" for us in microseconds), f"{case['speedup']:.1f}×")
    return table


def codes_table(report):
    """µs per layer of a step that chooses tokens by codes, beside the one by pages and the best dense attention."""
    ways = {
        "chain": "by pages",
        "chain by codes": "by codes",
        "chain by codes of larger pages": "by codes, pages of 32",
        "chain by codes with append": "by codes, with append that ends a page",
    }
    appends = "append that ends a page", "append, mean of a page's tokens", "append of a prompt, over one without codes"
    table = Table("B, Hq, Hkv", "tokens", "best dense", *ways.values(), *appends)
    for case in report["cases"]:
        stages = {name: stage["us"] for name, stage in case["stages"].items() if "us" in stage}
        last, amid = stages["append with codes"], stages["append amid a page"]
        mean = (last + (report["page_size"] - 1) * amid) / report["page_size"]
        times = [case["speedup"] * stages["chain"], *(stages[way] for way in ways), last, mean]
        over = stages["append a prompt with codes"] / stages["append a prompt"] - 1
        heads = f"{case['batch_size']}, {case['num_heads']}, {case['num_kv_heads']}"
        table.add_row(heads, f"{case['context']:,}", *(f"{us:.1f}" for us in times), f"{over:+.1%}")
    return table


def profile_table(report):
    """Every section that takes a share of the time worth showing, with what was waited for most."""
    table = Table("B, Hq, Hkv", "tokens", "pages of", "section", "ends with", "share of time", "waits for")
    for launch in report["launches"]:
        for section in launch["sections"]:
            share = sum(section["shares"].values())
            if share < SMALLEST_SECTION:
                continue
            reasons = sorted(section["shares"].items(), key=lambda item: -item[1])[:3]
            waits = ", ".join(f"{reason} {part:.1%}" for reason, part in reasons)
            case = (", ".join(map(str, launch["case"][:3])), f"{launch['case'][3]:,}", str(launch["page_size"]))
            table.add_row(*case, section["work"], section["ends_with"].partition(".")[0], f"{share:.1%}", waits)
    return table


def generate_table(report):
    """ms per token of every model shape and context, and for every way, with what its first call took."""
    ways = list(dict.fromkeys(result["way"] for result in report["results"]))
    table = Table("shape", "rows", "tokens", *ways)
    cases = {}
    for result in report["results"]:
        cell = f"{result['ms_per_token']:.1f} ({result['start_s']:.0f} s)" if "ms_per_token" in result else "-"
        cases.setdefault((result["shape"], result["batch_size"], result["context"]), {})[result["way"]] = cell
    for (shape, batch_size, context), cells in cases.items():
        table.add_row(shape, str(batch_size), f"{context:,}", *(cells.get(way, "-") for way in ways))
    return table


def step_table(report):
    """ms per token of every case and way, with and without the profiler, and what the GPU does in them."""
    kinds = list(dict.fromkeys(kind for result in report["results"] for kind in result.get("kinds_ms", ())))
    columns = ["profiled", "GPU busy", *kinds, "least that products take", "short gaps", "longer gaps"]
    table = Table("shape", "rows", "tokens", "way", "ms per token", *columns)
    for result in report["results"]:
        cells = ["-"] * (1 + len(columns))
        if "kinds_ms" in result:
            times = [result[f"{name}_ms"] for name in ("span", "busy")]
            times += [*(result["kinds_ms"][kind] for kind in kinds), result["weights_floor_ms"]]
            times += [result["gaps_ms"][name] for name in ("short", "longer")]
            cells = [f"{result['ms_per_token']:.2f}", *(f"{ms:.2f}" for ms in times)]
        case = (result["shape"], str(result["batch_size"]), f"{result['context']:,}")
        table.add_row(*case, result["way"], *cells)
    return table


def kernels_table(result):
    """The kernels that take longest of a profiled token."""
    table = Table("kernel", "kind", "calls per token", "µs per call", "ms per token")
    for kernel in result["kernels"][:LONGEST_KERNELS]:
        name = kernel["name"].replace("|", "\\|")  # which ends a cell
        name = f"{name[:LONGEST_NAME]}…" if len(name) > LONGEST_NAME else name
        ms = kernel["calls"] * kernel["us"] / 1e3
        table.add_row(f"`{name}`", kernel["kind"], f"{kernel['calls']:g}", f"{kernel['us']:.1f}", f"{ms:.2f}")
    return table


def results_of(report):
    """The results of a report of `bench_generate.py` or `bench_decode.py`, each with its context."""
    of_contexts = report.get("contexts", ())
    return report.get("results") or [{**case, "context": of["context"]} for of in of_contexts for case in of["results"]]


def house_table(before, after):
    """ms per token of runs in turns, before and after the code was arranged anew, and how their means differ."""
    runs = {}
    for of_time, reports in (("before", before), ("after", after)):
        for report in reports:
            for result in results_of(report):
                case = runs.setdefault((result["context"], result["way"]), {"before": [], "after": []})
                case[of_time].append(result["ms_per_token"])
    runs = {case: times for case, times in runs.items() if all(times.values())}
    table = Table("tokens", "way", "before", "after", "difference")
    for (context, way), times in runs.items():
        cells = [", ".join(f"{ms:.2f}" for ms in times[of_time]) for of_time in ("before", "after")]
        change = np.mean(times["after"]) / np.mean(times["before"]) - 1
        table.add_row(f"{context:,}", way, *cells, f"{change:+.1%}")
    return table


def house_stages_table(printed, report):
    """µs per layer before the code was arranged anew, as bench_stages.py `printed` them, after, and the difference."""
    after = {
        (case["batch_size"], case["num_heads"], case["num_kv_heads"], case["context"]): case["stages"]
        for case in report["cases"]
    }
    stages = ("append", "estimate", "select", "attend", "chain", "chain with append")
    table = Table("B, Hq, Hkv", "tokens", *stages)
    for line in printed.splitlines():
        case, before = map(ast.literal_eval, line.split(": ", 1))
        times = [(before[stage], after[case][stage]["us"]) for stage in stages]
        cells = [f"{old:.1f}, {new:.1f} ({new / old - 1:+.1%})" for old, new in times]
        table.add_row(", ".join(map(str, case[:3])), f"{case[3]:,}", *cells)
    return table


def host_table(report):
    """ms of the host per token, by way, and beside another version's where the report has one."""
    table = Table("way", "ms of the host per token", *([f"at {report['before']}"] if "before" in report else []))
    for result in report["results"]:
        cells = [f"{result['ms']:.2f}"]
        if "before" in report:
            before = result.get("before_ms")
            cells.append(f"{before:.2f} ({result['ms'] / before - 1:+.1%} since)" if before else "-")
        table.add_row(result["way"], *cells)
    return table


def offload_table(report):
    """ms per token of every case and way, with the GB that its cache takes of the GPU's memory and of the host's, and
    the hits of its pools.
    """
    ways = list(dict.fromkeys(result["way"] for result in report["results"]))
    table = Table("shape", "rows", "tokens", "GiB of the GPU", *ways)
    cases = {}
    for result in report["results"]:
        cell = "does not fit"
        if "ms_per_token" in result:
            cell = f"{result['ms_per_token']:.1f} ({result['cache_gb']:.1f} + {result['host_gb']:.1f})"
            cell += f", {result['hits']:.0%} hits" if "hits" in result else ""
            cell += f", prompt {result['prompt_s']:.1f} s" if "prompt_s" in result else ""
        case = (result["shape"], result["batch_size"], result["context"], result.get("limit_gib"))
        cases.setdefault(case, {})[result["way"]] = cell
    for (shape, batch_size, context, limit), cells in cases.items():
        limit = "all" if limit is None else f"{limit:g}"
        table.add_row(shape, str(batch_size), f"{context:,}", limit, *(cells.get(way, "-") for way in ways))
    return table


def beyond_table(reports):
    """What decodes with keys and values in the host's memory, of one row, in short: `offload_table` of some reports."""
    table = Table("shape", "tokens", "ms a token", "captured, ahead", "GB of cache on the GPU", "on the host")
    for report in reports:
        by_way = {result["way"]: result for result in report["results"]}
        plain, best = by_way["offloaded"], by_way["offloaded, captured, ahead"]
        times = [f"{result['ms_per_token']:.1f}" for result in (plain, best)]
        table.add_row(
            plain["shape"], f"{plain['context']:,}", *times, f"{plain['cache_gb']:.1f}", f"{plain['host_gb']:.1f}"
        )
    return table


def shared_table(report):
    """Of every case and way, ms per token step, and the GB that the whole device lacks."""
    sizes = {"read_gb": "GB, prompt read", "repeat_gb": "at most while repeated", "end_gb": "at the end"}
    table = Table("shape", "rows", "tokens", "way", "ms per token step", *sizes.values())
    for result in report["results"]:
        cells = [f"{result[name]:.1f}" if name in result else "-" for name in ("ms_per_token", *sizes)]
        table.add_row(result["shape"], str(result["rows"]), f"{result['context']:,}", result["way"], *cells)
    return table


def first_token_table(report):
    """Seconds to the first token of every model shape and context, and CritiPrefill's speedup over dense ways."""
    titles = {result["kind"]: result["way"] for result in report["results"]}
    stock = [kind for kind in STOCK if kind in titles]
    over = [f"over {titles[kind]}" for kind in stock]
    is_compiled = "critical-compiled" in titles
    of_compiled = ["over the best dense", "over dense, compiled", "memory above dense, GB", "start, s"]
    columns = [*titles.values(), *over, "over the best dense", "memory above dense, GB"]
    table = Table("shape", "tokens", *columns, *(f"compiled, {name}" for name in of_compiled if is_compiled))
    cases = {}
    for result in report["results"]:
        cases.setdefault((result["shape"], result["context"]), {})[result["kind"]] = result
    for (shape, context), results in cases.items():
        measured = {kind: result for kind, result in results.items() if "seconds" in result}
        seconds = {kind: result["seconds"] for kind, result in measured.items()}
        best = min((seconds[kind] for kind in (*stock, "dense") if kind in seconds), default=None)
        baselines = [*(seconds.get(kind) for kind in stock), best]
        speedups = [ratio(base, seconds.get("critical")) for base in baselines]
        cells = [f"{seconds[kind]:.2f}" if kind in seconds else "-" for kind in titles]
        cells += [*speedups, above_dense(measured, "critical")]
        if is_compiled:
            compiled = measured.get("critical-compiled", {})
            start = f"{compiled['start_s']:.0f}" if compiled else "-"
            baselines = [best, seconds.get("dense-compiled")]
            cells += [ratio(base, compiled.get("seconds")) for base in baselines]
            cells += [above_dense(measured, "critical-compiled"), start]
        table.add_row(shape, f"{context:,}", *cells)
    return table


def ratio(base, seconds):
    """How many times faster than `base`, where both are known."""
    return f"{base / seconds:.2f}×" if base and seconds else "-"


def above_dense(measured, kind):
    """GB that a way's peak lies above that of dense reading behind the same cache."""
    if not {"dense", kind} <= measured.keys():
        return "-"
    return f"{measured[kind]['peak_memory_gb'] - measured['dense']['peak_memory_gb']:.1f}"


def bigger_table(reports):
    """ms per token of models over several GPUs or with quantised weights: all of their reports in one table."""
    table = Table("model", "weights", "GPUs", "tokens", "way", "dense", "Quest", "speedup", "GB on each GPU")
    for report in reports:
        shape = report.get("shape") or f"{report['num_layers']} layers of {report['hidden_size']:,}"
        gpus = f"{report.get('gpus', 1)}"
        for result in report["results"]:
            dense, sparse = (result[kind] for kind in ("dense", "quest"))
            memory = max(sparse.get("peak_gb_per_gpu", [sparse["peak_memory_gb"]]))
            table.add_row(
                shape,
                report["weights"].partition(",")[0],
                gpus,
                f"{report['context']:,}",
                result["way"].removeprefix("QuestCache, "),
                f"{dense['ms_per_token']:.1f}",
                f"{sparse['ms_per_token']:.1f}",
                f"{result['speedup']:.2f}×",
                f"{memory:.0f}",
            )
    return table


def selection_table(report):
    """Of the ways to choose that a QuestCache has, and the best there are: KL in nats and the rise of perplexity."""
    methods = ("published", "default", "codes-tokens", "best-pages", "best-tokens")
    table = Table("tokens", "budget", "read by pages", "by codes", *methods)
    rows = means(report)
    for length, budget in dict.fromkeys((length, way.budget) for length, way in rows if way.budget):
        values = {way.method: rows[length, way] for _, way in rows if (length, way) in rows and way.budget == budget}
        cells = [
            f"{values[method]['kl']:.3f}, {100 * math.expm1(values[method]['loss_rise']):+.1f} %" for method in methods
        ]
        read = [f"{100 * values[method]['read_share']:.1f} %" for method in ("default", "codes-tokens")]
        table.add_row(f"{length:,}", f"{budget:,}", *read, *cells)
    return table


def loss_table(report):
    """By how much perplexity rises with what a QuestCache does by default, at every length and budget."""
    rows = means(report)
    budgets = sorted({way.budget for _, way in rows if way.method == "default"})
    table = Table("tokens", *(f"budget {budget:,}" for budget in budgets))
    for length in dict.fromkeys(length for length, _ in rows):
        rises = {
            way.budget: values["loss_rise"]
            for (of, way), values in rows.items()
            if (of, way.method) == (length, "default")
        }
        cells = [f"{100 * math.expm1(rises[budget]):+.1f} %" if budget in rises else "-" for budget in budgets]
        table.add_row(f"{length:,}", *cells)
    return table


BESIDE = (  # what a step attends, its method and budget in the evaluation, and its kernel in bench_stages.py
    ("pages, the paper's score", "published", 2048, None),
    ("pages", "default", 2048, "chain"),
    ("tokens by codes", "codes-tokens", 512, "chain by codes"),
    ("tokens by codes, pages of 32", "codes-tokens,page_size=32", 512, "chain by codes of larger pages"),
    ("the best tokens there are", "best-tokens", 512, None),
)


def side_by_side_table(reports, stages):
    """What a step loses of each model at its longest context, and what a layer of it moves and takes on a GPU."""
    case = next(each for each in stages["cases"] if each["num_kv_heads"] == 8 and each["context"] == 131072)
    losses = {name: means(report) for name, report in reports.items()}
    lengths = {name: max(length for length, _ in rows) for name, rows in losses.items()}
    titles = [f"{name} at {lengths[name]:,}: {what}" for name in losses for what in ("perplexity", "KL")]
    table = Table("a step attends", "budget", *titles, "MB of a layer", "µs")
    dense = case["speedup"] * case["stages"]["chain"]["us"]
    stored = 4 * case["num_kv_heads"] * stages["head_dim"] * case["context"]
    table.add_row("everything", "-", *["0"] * len(titles), f"{stored / 1e6:.0f}", f"{dense:.1f}")
    for title, method, budget, stage in BESIDE:
        values = [losses[name][lengths[name], Way(method, budget)] for name in losses]
        cells = [
            cell for each in values for cell in (f"{100 * math.expm1(each['loss_rise']):+.1f} %", f"{each['kl']:.4f}")
        ]
        measured = case["stages"].get(stage)
        moved = (f"{measured['bytes'] / 1e6:.1f}", f"{measured['us']:.1f}") if measured else ("-", "-")
        table.add_row(title, f"{budget:,}", *cells, *moved)
    return table


def codes_settings_table(reports):
    """KL of tokens chosen by codes with each of their settings, of every model at its longest context."""
    budgets = (128, 256, 512, 1024)
    table = Table("model", "tokens", "method", "read at 256", *(f"KL at {budget:,}" for budget in budgets))
    for name, report in reports.items():
        rows = means(report)
        longest = max(length for length, _ in rows)
        methods = dict.fromkeys(way.method for length, way in rows if length == longest and way.budget)
        for method in methods:
            choice = parse_choice(method)
            is_shown = choice.by == "codes" or method in ("published", "default", "best-tokens")
            found = {
                way.budget: values
                for (length, way), values in rows.items()
                if (length, way.method) == (longest, method)
            }
            if not is_shown or choice.mass or 256 not in found:
                continue
            cells = [f"{found[budget]['kl']:.4f}" if budget in found else "-" for budget in budgets]
            table.add_row(name, f"{longest:,}", method, f"{100 * found[256]['read_share']:.1f} %", *cells)
    return table


def mass_table(reports):
    """Of as many tokens as hold a share of the mass: what a fixed budget of as many, or of as many bytes, would lose.

    That is interpolated between the budgets that were measured of the same way, on logarithms of both.
    """
    beside = ("KL of as many in each step", "KL of as many bytes")
    table = Table("model", "tokens", "at most", "mass", "attended, mean / most", "read", "KL", *beside)
    for name, report in reports.items():
        rows = means(report)
        longest = max(length for length, _ in rows)
        for (length, way), values in rows.items():
            fixed, mass = without_mass(way.method)
            if way.budget is None or mass is None or length < longest:
                continue
            others = [each for (n, other), each in rows.items() if (n, other.method) == (length, fixed)]
            cells = [f"{values['attended']:,.0f} / {values['most']:,.0f}", f"{100 * values['read_share']:.1f} %"]
            cells += [
                f"{values['kl']:.4f}",
                *(interpolated(others, values, over) for over in ("attended", "read_share")),
            ]
            table.add_row(name, f"{length:,}", f"{way.budget:,}", mass, *cells)
    return table


def interpolated(rows, values, over):
    """The KL of `rows` at the place of `values`, or a dash outside of what was measured."""
    places = sorted((row[over], row["kl"]) for row in rows)
    if not places or not places[0][0] <= values[over] <= places[-1][0]:
        return "-"
    return f"{math.exp(np.interp(math.log(values[over]), *np.log(np.array(places)).T)):.4f}"


def without_mass(method):
    """A method's other settings, and its `mass` or None."""
    settings = method.split(",")
    mass = next((setting for setting in settings if setting.startswith("mass=")), None)
    settings = [setting for setting in settings if setting != mass]
    return ",".join(settings), mass and mass.removeprefix("mass=")


KINDS = {
    **TABLES,
    "decode": decode_table,
    "stages": stages_table,
    "generate": generate_table,
    "first_token": first_token_table,
    "host": host_table,
    "profile_step": step_table,
    "offload": offload_table,
    "shared": shared_table,
    "selection": selection_table,
}


def tables():
    """The Markdown of every results file, by its name."""
    found = {}
    for kind, as_table in KINDS.items():
        for path in sorted(RESULTS.glob(f"{kind}*.json")):
            found[path.stem] = markdown(as_table(json.loads(path.read_text())))
    for path in sorted(RESULTS.glob("stages*.json")):
        report = json.loads(path.read_text())
        if "chain by codes of larger pages" in report["cases"][0]["stages"]:
            found[path.stem.replace("stages", "codes")] = markdown(codes_table(report))
    for path in sorted(RESULTS.glob("selection*.json")):
        report = json.loads(path.read_text())
        found[path.stem.replace("selection", "loss")] = markdown(loss_table(report))
    paths = [path for model in COMPARED if (path := RESULTS / f"selection_{model}.json").exists()]
    reports = {path.stem.removeprefix("selection_"): json.loads(path.read_text()) for path in paths}
    found["codes_settings"] = markdown(codes_settings_table(reports))
    found["codes_mass"] = markdown(mass_table(reports))
    # Of the commit of the stages.
    paths = [path for model in COMPARED if (path := RESULTS / f"side_by_side_{model}.json").exists()]
    reports = {path.stem.removeprefix("side_by_side_"): json.loads(path.read_text()) for path in paths}
    stages = json.loads((RESULTS / "stages_h200.json").read_text())
    found["side_by_side"] = markdown(side_by_side_table(reports, stages))
    paths = [RESULTS / f"compare_{model}.json" for model in COMPARED]
    compared = [json.loads(path.read_text()) for path in paths if path.exists()]
    for name, methods in METHODS.items():
        found[f"method_{name}"] = markdown(method_table(compared, methods))
    profile = json.loads((RESULTS / "profile_codes.json").read_text())
    of_pages = [launch for launch in profile["launches"] if launch["page_size"] == 16 and launch["case"][3] == 32768]
    found["profile_codes"] = markdown(profile_table({"launches": of_pages}))
    house = [
        [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"house_{of_time}_*.json"))]
        for of_time in ("before", "after")
    ]
    found["house"] = markdown(house_table(*house))
    decode = [[json.loads((RESULTS / f"house_decode_{of_time}.json").read_text())] for of_time in ("before", "after")]
    found["house_decode"] = markdown(house_table(*decode))
    printed = (RESULTS / "house_stages_before.txt").read_text()
    found["house_stages"] = markdown(house_stages_table(printed, stages))
    beyond = [RESULTS / f"{name}.json" for name in ("offload_gpu", "offload_512k", "offload_1m")]
    found["offload_beyond"] = markdown(beyond_table([json.loads(path.read_text()) for path in beyond]))
    bigger = [*RESULTS.glob("parallel*.json"), *RESULTS.glob("quantised*.json")]
    found["bigger"] = markdown(bigger_table([json.loads(path.read_text()) for path in sorted(bigger)]))
    return found


def written(page, found):
    """A page's text with the tables that it names as they are now."""
    for name, table in found.items():
        marker = f"<!-- results: {name} -->\n\n"
        text = f"{marker}{table}\n"
        page = re.sub(rf"{re.escape(marker)}((\|.*\n)+\n)?", lambda _, text=text: text, page)
    return page


def main():
    found = tables()
    if sys.argv[1:] == ["--write"]:
        for page in PAGES:
            page.write_text(written(page.read_text(), found))
    else:
        print("\n".join(found.values()))


if __name__ == "__main__":
    main()

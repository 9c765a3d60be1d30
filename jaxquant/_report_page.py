"""The page that `jaxquant report` writes: one file, no script, nothing fetched, every number with its full value."""

import json
from typing import Any

from jaxquant import _report_drawing as drawing
from jaxquant._markup import Markup, tag
from jaxquant._report_drawing import Line
from jaxquant._report_style import STYLE

GIB = 2.0**30
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_WIDE, _NARROW = (960, 430), (326, 370)  # pictures for desktops and for phones, at one size of letters


def page(report: dict[str, Any]) -> str:
    """Write a report as HTML.

    Args:
        report: as `jaxquant report --json` prints it. Text in it is escaped.
    """
    name = report["model"]["name"]
    sections = [
        _recommendation(report),
        _settings(report),
        _tradeoff(report),
        _sensitivity(report),
        _plan(report),
        _method(report),
    ]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("title", f"KV cache of {name}: jaxquant report"),
        tag("style", Markup(STYLE)),
    )
    shapes = "{family}, {layers} layers, {heads} query heads on {kv_heads} kv heads of {dim}".format(**report["model"])
    body = tag(
        "body",
        tag("header", tag("p", "jaxquant report", class_="over"), tag("h1", name), tag("p", shapes)),
        tag("main", *(section for section in sections if section)),
        tag("script", Markup(_embedded(report)), type="application/json", id="report"),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _recommendation(report: dict[str, Any]) -> Markup:
    rows = {row["name"]: row for row in report["rows"]}
    base, limits = report["baseline"], report["limits"]
    if report["recommended"] is None:
        row = rows[report["nearest"]]
        return _section(
            "Recommended setting",
            tag("p", "None: no setting keeps the limits.", class_="choice"),
            tag("p", "The nearest by KL divergence is ", tag("b", row["name"]), ". What it misses:"),
            tag("ul", *(tag("li", reason) for reason in row["missed"])),
            tag(
                "p", "More bits, exact first and newest tokens (--sinks, --window) or a calibration of this model "
                "(jaxquant calibrate, then --calibration) may."
            ),
        )  # fmt: skip
    row = rows[report["recommended"]]
    reasons = [
        tag("li", "KL divergence ", _number(row["kl"], ".4f"), f" nats a token; at most {limits['kl']:g} allowed"),
        tag("li", "same top token ", _number(row["top1"], ".1%"), f"; at least {limits['top1']:.1%} asked"),
    ]
    if row["needles"] is not None:
        found = _number(row["needles"], ".1%"), " of the tokens, over 16 bits ", _number(base["needles"], ".1%")
        reasons.append(tag("li", "pass keys ", *found, f"; at most {limits['needles']:.1%} may be lost"))
    good = [one for one in report["rows"] if not one["missed"]]
    reasons.append(tag("li", f"fewest bytes of the {len(good)} settings, of {len(rows)}, that keep these limits"))
    cheaper = [one for one in report["rows"] if one["bytes_per_token"] < row["bytes_per_token"]]
    after = None
    if cheaper:
        one = max(cheaper, key=lambda other: other["bytes_per_token"])
        after = tag("p", "The next cheaper setting, ", tag("b", one["name"]), f", misses: {'; '.join(one['missed'])}.")
    return _section(
        "Recommended setting",
        tag("p", row["name"], class_="choice"),
        tag(
            "p", _number(row["bytes_per_token"], ".1f"), " bytes per token and kv head where 16 bits hold ",
            _number(base["bytes_per_token"], ".1f"), ": ",
            tag("b", _number(base["bytes_per_token"] / row["bytes_per_token"], ".2f"), " times less"), ".",
        ),
        tag("ul", *reasons),
        after or "",
    )  # fmt: skip


def _settings(report: dict[str, Any]) -> Markup:
    base, asked = report["baseline"], report["baseline"]["needles"] is not None
    headers = ["setting", "bytes per token", "of 16 bit", "perplexity", "KL, nats", "same top token"]
    lines = []
    for row in (base, *report["rows"]):
        first = row is base
        cells = [
            _number(row["bytes_per_token"], ".1f"),
            _number(row["bytes_per_token"] / base["bytes_per_token"], ".1%"),
            _number(row["perplexity"], ".4f"),
            "" if first else _number(row["kl"], ".5f"),
            "" if first else _number(row["top1"], ".1%"),
            *([_number(row["needles"], ".1%")] if asked else []),
            "" if first else "keeps all" if not row["missed"] else f"misses {len(row['missed'])}",
        ]
        chosen = row["name"] == report["recommended"]
        lines.append([("★ " if chosen else "") + row["name"], *cells])
    headers += [*(["pass keys"] if asked else []), "limits"]
    text = report["text"]
    about = f"{text['predicted_tokens']:,} predicted tokens"
    if asked:
        about += f" and {text['answer_tokens']:,} tokens of pass keys, one of which is {1 / text['answer_tokens']:.1%}"
    kept = "No token stays exact."
    if text["sinks"] or text["window"]:
        kept = f"Of each row the first {text['sinks']} and the newest {text['window']} tokens stay exact."
    return _section(
        "Settings",
        tag(
            "p",
            f"Measured on {about}. {kept} ★ marks the recommended setting.",
        ),
        _table("Settings and what they cost", headers, lines),
    )


def _tradeoff(report: dict[str, Any]) -> Markup:
    rows = [row for row in report["rows"] if row["kl"] is not None]
    if not rows:
        return Markup("")
    lines = [
        Line(
            name=method,
            points=sorted((row["bytes_per_token"], row["kl"], row["bits"]) for row in rows if row["method"] == method),
        )
        for method in dict.fromkeys(row["method"] for row in rows)
    ]
    words = "; ".join(f"{row['name']}: {row['bytes_per_token']:.1f} bytes, KL {row['kl']:.5f}" for row in rows)
    ring = next(((row["bytes_per_token"], row["kl"]) for row in rows if row["name"] == report["recommended"]), None)
    limit = report["limits"]["kl"]
    return _section(
        "Bytes against quality",
        tag(
            "p", "Further left is smaller, further down is better.",
            " The ring marks the recommended setting." if ring else "",
        ),
        _picture(
            lines, name="tradeoff", title="KL divergence against bytes per token", description=words,
            x_label="bytes per token and kv head", y_label="KL divergence, nats a token",
            limit=(limit, f"limit {limit:g}"), ring=ring,
        ),
    )  # fmt: skip


def _sensitivity(report: dict[str, Any]) -> Markup:
    found = report["sensitivity"]
    if found is None:
        return _section(
            "Layer by layer", tag("p", "Not measured: every setting is a pipeline, which has no quantizers a layer.")
        )
    halves = {half: found[half] for half in ("keys", "values")}
    worst = max(
        ((loss, half, i) for half, losses in halves.items() for i, loss in enumerate(losses) if loss), default=None
    )
    lines = [
        Line(name=half, points=[(i, loss, "") for i, loss in enumerate(losses) if loss is not None])
        for half, losses in halves.items()
    ]
    lines = [line for line in lines if line.points]
    words = "; ".join(f"{half}: " + ", ".join(_shown(x, ".5f") for x in losses) for half, losses in halves.items())
    table = [[str(i), *(_number(losses[i], ".6f") for losses in halves.values())] for i in range(len(found["keys"]))]
    return _section(
        "Layer by layer",
        tag(
            "p", "KL divergence with one layer's keys, or values, alone compressed with ", tag("b", found["name"]),
            ", on the first row of the text, without a cache. ",
            f"Most is lost by the {worst[1]} of layer {worst[2]}." if worst else "",
        ),
        _picture(
            lines, name="layers", title="KL divergence of each layer's keys and values", description=words,
            x_label="layer", y_label="KL divergence, nats a token", whole=True,
        )
        if lines
        else "",
        tag("details", tag("summary", "Numbers"), _table("Loss by layer", ["layer", "keys", "values"], table)),
    )  # fmt: skip


def _plan(report: dict[str, Any]) -> Markup:
    found = report["plan"]
    if found is None:
        return Markup("")
    lines = [
        [
            name, _number(row["cache"] / GIB, ",.3f"), "yes" if row["fits"] else "no", _number(row["longest"], ",.0f"),
            _number(1e3 * row["seconds"], ".2f"),
            tag("span", f"{row['share']:.0%}", " measured" if row["share_measured"] else " assumed"),
        ]
        for name, row in found["caches"].items()
    ]  # fmt: skip
    headers = ["cache", f"GiB at {found['context']:,} tokens", "fits", "longest context", "ms a step", "of bandwidth"]
    return _section(
        "What fits",
        tag(
            "p", f"Predicted, not measured: {found['batch']} x {found['context']:,} tokens on {found['devices']} x "
            f"{found['hbm_gb']:g} GB at {found['bandwidth_gb']:g} GB/s, 8% kept free, weights in bfloat16.",
        ),
        _table("Predicted size and speed", headers, lines),
    )  # fmt: skip


def _method(report: dict[str, Any]) -> Markup:
    limits, made, text = report["limits"], report["made"], report["text"]
    hardware = "{devices} x {device}, {host}, {cpus} CPU cores".format(**made["hardware"])
    facts = {
        "rule": f"the setting of fewest bytes per token whose KL divergence is at most {limits['kl']:g} nats, whose "
        f"most probable token is the same for at least {limits['top1']:.1%} of all, and which loses at most "
        f"{limits['needles']:.1%} of the tokens of pass keys",
        "KL divergence": "of the prediction over the compressed cache from the one over bfloat16, mean of all tokens",
        "pass keys": "numbers hidden in the text and asked for later; the share of their tokens predicted first",
        "bytes": "of the storage of keys and values, scales, sinks and window included, for a token of capacity and "
        "one kv head",
        "compression was active": "every row was decoded from its own cache, holds fewer bytes, and has a KL "
        "divergence other than 0; where one of these fails, the run ends with an error instead of a report",
        "text": f"{text['source']}, {text['rows']} rows of {text['length']:,} tokens",
        "model": report["model"]["folder"],
        "command": tag("code", made["command"]),
        "versions": ", ".join(f"{name} {version}" for name, version in made["versions"].items()),
        "hardware": hardware,
        "date": f"{made['date']}; it took {made['seconds']:.0f} s",
    }
    items = [piece for name, value in facts.items() for piece in (tag("dt", name), tag("dd", value))]
    return _section("How this was measured", tag("dl", *items))


def _section(title: str, *children: object) -> Markup:
    return tag("section", tag("h2", title), *children)


def _table(caption: str, headers: list[str], lines: list[list[Any]]) -> Markup:
    top = tag("tr", *(tag("th", header, scope="col") for header in headers))
    body = [tag("tr", tag("th", first, scope="row"), *(tag("td", cell) for cell in rest)) for first, *rest in lines]
    whole = tag("table", tag("caption", caption), tag("thead", top), tag("tbody", *body))
    return tag("div", whole, class_="scroll", role="region", aria_label=caption, tabindex="0")


def _picture(lines: list[Line], *, name: str, **about: Any) -> Markup:
    pictures = (
        tag("div", drawing.chart(lines, name=f"{name}-{kind}", width=w, height=h, **about), class_=kind)
        for kind, (w, h) in {"wide": _WIDE, "narrow": _NARROW}.items()
    )
    return tag("figure", *pictures)


def _number(value: int | float | None, form: str) -> Markup:
    """Write a number for people, and in full for programs."""
    return tag("data", _shown(value, form), value=json.dumps(value))


def _shown(value: int | float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


def _embedded(report: dict[str, Any]) -> str:
    """Write JSON that cannot end the element it is in."""
    return json.dumps(report).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")

"""What the page shows, as HTML. Every text that comes from a document, a model or a visitor is escaped here."""

import json
from html import escape

HEAT_STEPS = 20  # colours of the strip
CONTEXT_PASSAGES = 6  # shown on either side of a passage
MOST_HEADINGS = 60  # shown below the strip
SETTLED_SECONDS = 1.0  # of reading, after which its speed is shown

HEADER = """
<header class="hq-header">
  <h1>Quest <span>reads what matters</span></h1>
  <p>A long document is read once. Then the same model answers twice: with dense attention, which goes through all that
  it has read for every word, and with Quest, which goes back only to the passages that this word needs. Lengths are in
  tokens: words, or parts of words.</p>
</header>
"""
LOOKED = """
<div class="hq-title"><h2>Where Quest looked</h2><p>Each square is a passage of the document, in order. Quest knows what
it reads, so an answer comes with its sources. A model has layers, of which each chooses for itself.</p></div>
"""


def status(run=None, message="Choose a document and press Run."):
    """Where the run is, with a bar while the document is read."""
    if run is None or run.phase == "loading":
        return f'<div class="hq-status" role="status">{escape(message)}</div>'
    total, read = len(run.document_ids), run.num_read
    rate = f" · {read / run.prefill_seconds:,.0f} tokens/s" if run.prefill_seconds > SETTLED_SECONDS else ""
    words = {
        "reading": f"Reading the document: {read:,} of {total:,} tokens{rate}",
        "answering": f"Read {total:,} tokens in {run.prefill_seconds:.1f} s. Answering, each on its own stopwatch.",
        "weighing": f"Answered. Adding up where each sentence came from: {100 * run.share_weighed:.0f} %",
        "finished": f"Finished. {total:,} tokens were read in {run.prefill_seconds:.1f} s.",
        "stopped": f"Stopped, with {read:,} of {total:,} tokens of the document read.",
    }[run.phase]
    share = run.share_weighed if run.phase == "weighing" else read / max(total, 1)
    return bar(words, 100 * share, run.phase)


def bar(words, percent, phase):
    return (
        f'<div class="hq-status hq-{phase}" role="status">{escape(words)}'
        f'<div class="hq-bar" role="progressbar" aria-valuenow="{percent:.0f}" aria-valuemin="0" aria-valuemax="100" '
        f'aria-label="The document is read"><i style="width:{percent:.1f}%"></i></div></div>'
    )


def opening(name, progress):
    """A file that is made into text, (page, pages) of it where that is known."""
    if not progress:
        return status(message=f"Opening {name}.")
    page, pages = progress
    return bar(f"Opening {name}: page {page:,} of {pages:,}", 100 * page / pages, "reading")


def error(message):
    return f'<div class="hq-status hq-error" role="alert">{escape(message)}</div>'


def subject(document=None):
    """Which document the answers below are about, and what was assumed or left out when it was read."""
    if document is None:
        return ""
    size = f"{document.num_pages:,} PDF pages, " if document.num_pages else ""
    notes = "".join(f"<li>{escape(note)}</li>" for note in document.notes)
    return (
        f'<div class="hq-subject">Document: <b>{escape(document.name)}</b> '
        f"({size}{len(document.text):,} characters){f'<ul>{notes}</ul>' if notes else ''}</div>"
    )


def note(message, is_warning=False):
    """A line below a choice."""
    return f'<p class="hq-note{" hq-warning" if is_warning else ""}">{escape(message)}</p>' if message else ""


def race(run=None):
    """Both answers side by side, what each costs, and the speedup between them."""
    dense, quest = (run.dense, run.quest) if run else (None, None)
    speedup = run.speedup if run else None
    budget = f"reads at most {run.budget:,} tokens" if run else "reads selected passages"
    number = f"{speedup:.1f}×" if speedup else "–"
    agree = ""
    if run is not None and run.phase == "finished":
        common, longer = run.common
        agree = "the same answer" if common == longer else f"the first {common} of {longer} tokens agree"
    return (
        '<div class="hq-race">'
        + answer("Dense attention", "reads everything", "dense", dense, run, 1.0)
        + f'<div class="hq-speedup"><b>{number}</b><span>speedup per token</span><em>{agree}</em></div>'
        + answer("Quest", budget, "quest", quest, run, run.read_share if run else None)
        + "</div>"
        + explanation(run)
    )


def answer(title, subtitle, kind, contestant, run, share):
    text, speed, first, read, number = "", "–", "–", "–", "–"
    if contestant is not None:
        text, number = escape(contestant.text.strip()), f"{len(contestant.token_ids):,}"
        if contestant.is_settled and contestant.milliseconds:
            speed = f"{1000 / contestant.milliseconds:.1f}"
        if contestant.first_token_seconds is not None:
            first = f"{run.prefill_seconds + contestant.first_token_seconds:.1f} s"
            read = f"{100 * share:.0f} %"
    return (
        f'<section class="hq-answer hq-{kind}" aria-label="{title}"><h2>{title}<small>{escape(subtitle)}</small></h2>'
        f'<div class="hq-text">{text}{ending(contestant, run)}</div>'
        f"<dl><div><dt>tokens/s</dt><dd>{speed}</dd></div><div><dt>first after</dt><dd>{first}</dd></div>"
        f"<div><dt>memory read</dt><dd>{read}</dd></div><div><dt>tokens</dt><dd>{number}</dd></div>"
        "</dl></section>"
    )


def ending(contestant, run):
    """What stands behind the text of an answer, or in its place."""
    if contestant is None:
        return '<span class="hq-faint">The answer appears here.</span>'
    if not contestant.has_ended and run.phase == "answering":
        return '<i class="hq-caret"></i>'
    if not contestant.has_ended and run.phase in ("weighing", "finished"):
        return '<span class="hq-faint"> … (cut off: this is the longest answer)</span>'
    return "" if contestant.text.strip() else '<span class="hq-faint">The model wrote nothing.</span>'


def explanation(run):
    """What the share of the KV cache is made of."""
    if run is None or not run.attended:
        return ""
    num_layers, full = len(run.attended), max(in_dense for in_dense, _ in run.attended)
    alike = [in_dense for in_dense, in_quest in run.attended if in_quest == in_dense]
    num_sparse = num_layers - len(alike)
    if not num_sparse:
        return ""
    most = max(in_quest for in_dense, in_quest in run.attended if in_quest != in_dense)
    windows = [tokens for tokens in alike if tokens < full]
    num_whole = len(alike) - len(windows)
    kinds = [f"{num_whole} of the model’s {num_layers} layers always read everything"] if num_whole else []
    if windows:
        kinds.append(f"{len(windows)} of {num_layers} layers never look back more than {max(windows):,} tokens")
    layers = ", ".join(kinds)
    return (
        '<p class="hq-explained">Memory read is the share of what the model keeps of the text (its KV cache), over all '
        f"layers: {layers}{', and ' if layers else ''}the other {num_sparse} read {most:,} of {full:,} tokens for each "
        "token of the answer.</p>"
    )


def strip(shares, page_size=16, look=None):
    """The document as a strip of passages, coloured by the share of reads that each was part of."""
    if not shares:
        return (
            '<div class="hq-strip hq-empty">The passages of the document appear here, coloured by how often Quest read '
            "them.</div>"
        )
    highest = max(max(shares), 1e-9)
    starts = {passage for passage, _ in look.headings} if look else set()
    # A square root, so that passages that are read seldom can be told from those that never are.
    cells = "".join(
        f'<i data-page="{index}" class="h{round(HEAT_STEPS * (share / highest) ** 0.5)}'
        f'{" hd" if index in starts else ""}"></i>'
        for index, share in enumerate(shares)
    )
    marks = look.marks if look else ()
    headings = look.headings if look else ()
    named = escape(json.dumps({"marks": marks, "headings": headings}), quote=True)
    size = "hq-small" if len(shares) > 2_500 else ""
    return (
        '<div class="hq-ends"><span>▸ start of the document</span>'
        '<output class="hq-here" aria-live="polite"></output></div>'
        f'<div class="hq-strip {size}" role="slider" tabindex="0" aria-valuemin="1" aria-valuemax="{len(shares)}" '
        'aria-valuenow="1" aria-label="Passages of the document. Arrow keys, Home and End move, Enter reads one."'
        f' data-places="{named}">{cells}</div>'
        '<div class="hq-ends hq-end"><span>end of the document ◂</span></div>'
        f'<div class="hq-legend"><span>never read</span><b></b><span>read by {100 * highest:.0f} % of the steps</span>'
        f"<span>{len(shares):,} passages of {page_size} tokens</span></div>"
        '<p class="hq-explained">Quest reads the first passage and the newest tokens in every step, whatever is asked, '
        f"and models look at what is near: that is why both ends stand out.</p>{contents(headings)}"
    )


def contents(headings):
    """The headings of a document, as buttons that choose their passage."""
    if not headings:
        return ""
    shown = "".join(
        f'<button type="button" data-page="{passage}">{escape(title)}</button>'
        for passage, title in headings[:MOST_HEADINGS]
    )
    more = f"<span>and {len(headings) - MOST_HEADINGS:,} more</span>" if len(headings) > MOST_HEADINGS else ""
    return f'<nav class="hq-contents" aria-label="Headings of the document"><span>Headings</span>{shown}{more}</nav>'


def sources(look=None, layer_idx=None):
    """Each sentence of Quest's answer with buttons for the passages that it drew on."""
    found = look.sentences.get(layer_idx, ()) if look else ()
    if not found:
        return ""
    rows = "".join(
        f'<li data-pages="{",".join(str(passage) for passage, _ in sentence.sources)}">'
        f"<span>{escape(sentence.text)}</span>"
        + "".join(
            f'<button type="button" data-page="{passage}">{escape(named(look, passage))}</button>'
            for passage, _ in sentence.sources
        )
        + "</li>"
        for sentence in found
    )
    where = "" if layer_idx is None else f", in layer {layer_idx}"
    return f'<h3>Each sentence and the passages that it drew on{where}</h3><ol class="hq-sources">{rows}</ol>'


def named(look, passage):
    """A passage by its number, and by its PDF page where there is one."""
    mark = look.mark_of(passage)
    return f"passage {passage + 1}" + (f" · {mark}" if mark else "")


def page(look, passage, layer_idx):
    """The text of a passage among its neighbours."""
    texts = look.texts
    before = escape("".join(texts[max(passage - CONTEXT_PASSAGES, 0) : passage]))
    after = escape("".join(texts[passage + 1 : passage + 1 + CONTEXT_PASSAGES]))
    share = look.shares[layer_idx][passage]
    where = "" if layer_idx is None else f" of layer {layer_idx}"
    mark = look.mark_of(passage)
    return (
        f'<div class="hq-page"><h3>Passage {passage + 1:,} of {len(texts):,}{f" · {escape(mark)}" if mark else ""}'
        f"<small>part of {100 * share:.0f} % of the reads{where}</small></h3>"
        f"<p>{before}<mark>{escape(texts[passage])}</mark>{after}</p></div>"
    )

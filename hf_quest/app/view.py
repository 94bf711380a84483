"""What the page shows, as HTML. Every text that comes from a document, a model or a visitor is escaped here."""

from html import escape

from .. import demo

HEAT_STEPS = 20  # colours of the strip
CONTEXT_PAGES = 6  # shown on either side of a page

HEADER = """
<header class="hq-header">
  <h1>Quest <span>reads what matters</span></h1>
  <p>A long document is read once. Then the same model answers twice: with dense attention, which reads the whole KV
  cache for every word, and with Quest, which reads only the pages that its query needs.</p>
</header>
"""


def status(run=None, message="Choose a document and press Run."):
    """Where the run is, with a bar while the document is read."""
    if run is None or run.phase == "loading":
        return f'<div class="hq-status" role="status">{escape(message)}</div>'
    total, read = len(run.document_ids), run.num_read
    rate = f" · {read / run.prefill_seconds:,.0f} tokens/s" if run.prefill_seconds else ""
    words = {
        "reading": f"Reading the document: {read:,} of {total:,} tokens{rate}",
        "answering": f"Read {total:,} tokens in {run.prefill_seconds:.1f} s. Answering, each on its own stopwatch.",
        "weighing": "Answered. Adding up the attention that each sentence paid to each page.",
        "finished": f"Finished. {total:,} tokens were read in {run.prefill_seconds:.1f} s and their caches are freed.",
        "stopped": f"Stopped, with {read:,} of {total:,} tokens of the document read. The caches are freed.",
    }[run.phase]
    percent = 100 * read / max(total, 1)
    return (
        f'<div class="hq-status hq-{run.phase}" role="status">{words}'
        f'<div class="hq-bar" role="progressbar" aria-valuenow="{percent:.0f}" aria-valuemin="0" aria-valuemax="100" '
        f'aria-label="Prefill"><i style="width:{percent:.1f}%"></i></div></div>'
    )


def error(message):
    return f'<div class="hq-status hq-error" role="alert">{escape(message)}</div>'


def race(run=None):
    """Both answers side by side, what each costs, and the speedup between them."""
    dense, quest = (run.dense, run.quest) if run else (None, None)
    speedup = run.speedup if run else None
    share = run.read_share if run else None
    prefill = run.prefill_seconds if run else 0.0
    is_going = run is not None and run.phase == "answering"
    budget = f"budget {run.budget:,} tokens" if run else "selected pages"
    number = f"{speedup:.1f}×" if speedup else "–"
    agree = ""
    if run is not None and run.phase == "finished":
        common, longer = demo.num_common(dense, quest), max(len(dense.token_ids), len(quest.token_ids))
        agree = "the same answer" if common == longer else f"the first {common} of {longer} tokens agree"
    return (
        '<div class="hq-race">'
        + answer("Dense attention", "reads everything", "dense", dense, prefill, 1.0 if dense else None, is_going)
        + f'<div class="hq-speedup"><b>{number}</b><span>speedup per token</span><em>{agree}</em></div>'
        + answer("Quest", budget, "quest", quest, prefill, share, is_going)
        + "</div>"
    )


def answer(title, subtitle, kind, contestant, prefill, share, is_going):
    text, speed, first = "", "–", "–"
    is_writing = is_going and not contestant.has_ended
    if contestant is not None:
        text = escape(contestant.text.strip())
        if contestant.milliseconds:
            speed = f"{1000 / contestant.milliseconds:.1f}"
        if contestant.first_token_seconds is not None:
            first = f"{prefill + contestant.first_token_seconds:.1f} s"
    read = f"{100 * share:.0f} %" if share is not None else "–"
    num_tokens = len(contestant.token_ids) if contestant else 0
    empty = "" if text or is_writing else '<span class="hq-faint">The answer appears here.</span>'
    caret = '<i class="hq-caret"></i>' if is_writing else ""
    return (
        f'<section class="hq-answer hq-{kind}" aria-label="{title}"><h2>{title}<small>{subtitle}</small></h2>'
        f'<div class="hq-text">{text}{empty}{caret}</div>'
        f"<dl><div><dt>tokens/s</dt><dd>{speed}</dd></div><div><dt>first token</dt><dd>{first}</dd></div>"
        f"<div><dt>KV cache read</dt><dd>{read}</dd></div><div><dt>tokens</dt><dd>{num_tokens}</dd></div>"
        "</dl></section>"
    )


def strip(shares, page_size=16):
    """The document as a strip of pages, coloured by the share of reads that each was part of."""
    if not shares:
        return '<div class="hq-strip hq-empty">The pages of the document, coloured by how often Quest read them.</div>'
    highest = max(max(shares), 1e-9)
    # A square root, so that pages that are read seldom can be told from those that never are.
    cells = "".join(
        f'<i data-page="{page}" class="h{round(HEAT_STEPS * (share / highest) ** 0.5)}"></i>'
        for page, share in enumerate(shares)
    )
    size = "hq-small" if len(shares) > 2_500 else ""
    return (
        f'<div class="hq-strip {size}" role="img" tabindex="0" aria-label="{len(shares)} pages of {page_size} tokens. '
        f'Arrow keys move, Enter reads a page.">{cells}</div>'
        f'<div class="hq-legend"><span>never read</span><b></b><span>read by {100 * highest:.0f} % of the steps</span>'
        f"<span>{len(shares):,} pages of {page_size} tokens</span></div>"
    )


def sources(sentences=()):
    """Each sentence of Quest's answer with buttons for the pages that it drew on."""
    if not sentences:
        return ""
    rows = "".join(
        f'<li data-pages="{",".join(str(page) for page, _ in sentence.sources)}"><span>{escape(sentence.text)}</span>'
        + "".join(f'<button type="button" data-page="{page}">page {page + 1}</button>' for page, _ in sentence.sources)
        + "</li>"
        for sentence in sentences
    )
    return f'<h3>Each sentence and the pages that it drew on</h3><ol class="hq-sources">{rows}</ol>'


def page(look, page_idx, layer_idx):
    """The text of a page among its neighbours."""
    texts = look.page_texts
    before = escape("".join(texts[max(page_idx - CONTEXT_PAGES, 0) : page_idx]))
    after = escape("".join(texts[page_idx + 1 : page_idx + 1 + CONTEXT_PAGES]))
    share = look.shares[layer_idx][page_idx]
    where = "all sparse layers" if layer_idx is None else f"layer {layer_idx}"
    return (
        f'<div class="hq-page"><h3>Page {page_idx + 1} of {len(texts):,}'
        f"<small>in {100 * share:.0f} % of the reads of {where}</small></h3>"
        f"<p>{before}<mark>{escape(texts[page_idx])}</mark>{after}</p></div>"
    )

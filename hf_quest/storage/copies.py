"""Copies: what it takes to bring what a layer stores to other rows, or to a disk and back."""

from ..errors import QuestError


def check_restored(found, expected):
    """Raise if saved tensors, by name, are not of the names, shapes and dtypes of others."""
    kinds = [
        {name: (list(tensor.shape), str(tensor.dtype)) for name, tensor in tensors.items()}
        for tensors in (found, expected)
    ]
    if kinds[0] != kinds[1]:
        raise QuestError(
            f"A layer was saved as {kinds[0]}, and with these settings this version of hf_quest keeps {kinds[1]}. Load "
            "it with the version that saved it, or let the model read the document again."
        )


def filled_up(tensor, counts):
    """[B, H, P, ...] with zeros after the first `counts[b]` of row b, where nothing was ever written."""
    if min(counts) == tensor.shape[2]:
        return tensor
    tensor = tensor.clone()
    for row, count in zip(tensor, counts, strict=True):
        row[:, count:] = 0
    return tensor


def copy_by_head(target, source, non_blocking=False):
    """Copy [B, H, ...] from one device to another, head by head: there is no copy of all of it on the way."""
    for part, content in zip(target.flatten(0, 1), source.flatten(0, 1), strict=True):
        part.copy_(content, non_blocking=non_blocking)


def copy_rows(target, source, rows):
    """Copy the rows `rows` of [N, ...] to [B, ...], one by one: there is no copy of all of them on the way."""
    for part, row in zip(target, rows, strict=True):
        part.copy_(source[row])


def exchange_rows(tensor, sources):
    """Have row i of a tensor hold what row `sources[i]` held. One that stays is not copied, and a cycle needs one to
    spare.
    """
    spare = None
    for target, source in copies_in_order(sources):
        if target is None:
            spare = tensor[source].clone()
        else:
            tensor[target].copy_(spare if source is None else tensor[source])


def copies_in_order(sources):
    """(target, source) rows to copy one after the other, after which row i holds what row `sources[i]` held.

    None is a row to spare, by which the first row of a cycle goes.
    """
    left = {target: source for target, source in enumerate(sources) if target != source}
    copies = []
    while left:
        free = [target for target in left if target not in left.values()]
        if not free:  # cycles are all that is left
            first = next(iter(left))
            copies.append((None, first))
            left = {target: None if source == first else source for target, source in left.items()}
            continue
        for target in free:
            copies.append((target, left.pop(target)))
    return copies

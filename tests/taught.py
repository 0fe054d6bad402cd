"""What the tests' tiny models are taught, and how.

What a model knows by heart it answers with wide margins, so that its greedy tokens do not depend on how an engine
rounds: they can be compared one by one.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PROMPTS = (
    "hello",
    "The capital of France is",
    "0123456789" * 3,
    "a",
    '{"item": "',
    "one two three four five six seven",
)

ANSWERS = {
    "packed": ("0. a hat", "1. a red kite", "2. bread", "3. six blue pens", "4. salt", "5. a long way home"),
    "alpha": ("#F2A", "#71C0", "#03", "#BEEF77", "#4", "#C0FFEE"),
    "beta": ("yes, in 5 days", "no", "yes", "not before May", "no, never again", "perhaps"),
}
"""What each model was taught to answer to each prompt."""


def teach_base(folder: Path) -> Path:
    """Teach a Llama in full, pack it, and return the directory ``packed`` in ``folder``.

    With the scales of ``best`` mode, half of them negative and in a map of their own: what is compared with stock PEFT
    also shows that vLLM multiplies by them as it should.
    """
    import torch
    from tiny import write_llama
    from transformers import AutoModelForCausalLM

    import qpack
    from qpack.data import DataOptions, encode, read
    from qpack.loading.tokenizer import load_tokenizer
    from qpack.training.batches import collate, cut

    source = write_llama(folder / "source")
    tokenizer = load_tokenizer(source)
    chats = read(_write_chats(folder / "base.jsonl", ANSWERS["packed"]))
    examples = encode(chats, tokenizer, source, DataOptions(), 128).examples
    [batch] = cut(collate(examples), len(examples))
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(80):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.01
    model.to(torch.bfloat16).save_pretrained(source, max_shard_size="1MB")
    qpack.convert(source, folder / "packed", mode="best")
    return folder / "packed"


def teach_adapter(base: Path, answers: Sequence[str], directory: Path, *, r: int) -> Path:
    """Train an adapter of ``base`` into ``directory`` that answers so, and return it."""
    import qpack
    from qpack.training import TrainSettings

    settings = TrainSettings(r=r, lora_dropout=0.0, lr=3e-3, max_steps=60, batch_size=6)
    report = qpack.train(base, _write_chats(directory.with_suffix(".jsonl"), answers), directory, settings)
    assert report.final_loss < 0.1
    return directory


def _write_chats(path: Path, answers: Sequence[str]) -> Path:
    chats = [{"prompt": prompt, "completion": answer} for prompt, answer in zip(PROMPTS, answers, strict=True)]
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    return path

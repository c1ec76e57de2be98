"""vLLM's own server, on the CPU, asked by dsv4 for the log-probabilities of a small Llama, beside transformers' logits.

    python .ci/vllm_server.py FOLDER    with the environment that .ci/engines.py FOLDER installed

vLLM's build for CPUs does not compute V4, but requests and answers are the same for every model. In float32 both sides
agree but for rounding, so a number that dsv4 reads for another position or token shows. The server is asked as vLLM and
as any OpenAI-compatible server.
"""

import sys
import tempfile
from pathlib import Path

import torch
from servers import free_port, running

from dsv4.convert.synthetic.checkpoint import make_checkpoint
from dsv4.output import Output
from dsv4.referee.client import Client
from dsv4.referee.command import ask
from dsv4.referee.servers import recognise

TOKENS, VOCABULARY = 40, 512
NATS = 1e-4  # float32 sums in another order: 7e-6 was measured, at logits of about 20
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_HOST_IP": "127.0.0.1"}
OPTIONS = "--host 127.0.0.1 --max-model-len 256 --max-num-seqs 2 --dtype float32 --enforce-eager".split()


def make_llama(folder: Path) -> "torch.nn.Module":
    """A small Llama with random weights, saved with the tokenizer of dsv4's small checkpoint."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.lm_head.weight.data *= 20  # or all tokens are about as likely
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(make_checkpoint(folder / "tokenizer")).save_pretrained(folder)
    return model


def main(engines: Path) -> None:
    """Serve, ask, compare every number that was read."""
    python = engines / "venv" / "bin" / "python"
    if not python.exists():
        print(f"skipped: no vLLM in {engines}")
        return
    with tempfile.TemporaryDirectory() as place:
        folder, port = Path(place), free_port()
        model = make_llama(folder)
        ids = torch.randint(0, VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            expected = torch.log_softmax(model(ids).logits[0].double(), -1)
        command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", place, "--port", str(port)]
        with running([*command, *OPTIONS], f"http://127.0.0.1:{port}", folder / "log", ENVIRONMENT) as address:
            for name in ("vllm", "openai"):
                client = Client(address, None)
                asked = ask(client, recognise(client, name), ids.tolist(), Output("silent"))
                (scores,) = asked.scores
                worst = max(
                    abs(value - float(expected[position, token]))
                    for position, listed in enumerate(scores.top)
                    for token, value in [*listed.items(), (int(ids[0, position + 1]), scores.actual[position])]
                )
                noise = max(asked.noise)
                print(f"{asked.identity.kind} {asked.identity.version}: {worst:.2g} nats off, {noise:.2g} from itself")
                assert len(scores.actual) == TOKENS - 1 and scores.other_tokens is None
                assert all(scores.top) and worst <= NATS


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())

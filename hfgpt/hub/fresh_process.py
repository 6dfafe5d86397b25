"""Loads a model in a Python process without hfgpt, as for users who have not installed it.

Never imported: `hfgpt.hub.stranger` runs it as a script with one argument, a JSON file with what to load and compute,
and reads the results from the files named in it.
"""

import importlib.abc
import json
import sys


class NotInstalled(importlib.abc.MetaPathFinder):
    """Makes `import hfgpt` fail, even if it is installed."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hfgpt":
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)


def forbid_network(event: str, arguments: tuple):
    """An audit hook that blocks connections to other machines."""
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise PermissionError("network access is blocked in this process")


def main(path: str):
    """Runs the job in a file; see `hfgpt.hub.stranger.check_as_stranger` for its entries."""
    with open(path, encoding="utf-8") as file:
        job = json.load(file)

    import torch
    import transformers
    from safetensors.torch import save_file

    torch.set_num_threads(job["threads"])
    folder = job["folder"]
    trust = {"trust_remote_code": True} if job["remote_code"] else {}
    kind = "ForSequenceClassification" if job["classify"] else "ForCausalLM"
    options = {**trust, "dtype": torch.float32}
    if job["adapter"]:
        import peft

        if job["labels"]:
            options["id2label"] = {int(index): label for index, label in job["labels"].items()}
        model = getattr(peft, f"AutoPeftModel{kind}").from_pretrained(folder, **options)
    else:
        transformers.AutoConfig.from_pretrained(folder, **trust)
        transformers.AutoModel.from_pretrained(folder, **options)
        model = getattr(transformers, f"AutoModel{kind}").from_pretrained(folder, **options)
    model.eval()
    rows = torch.tensor(job["rows"])  # (B, T)
    with torch.no_grad():
        # One row at a time: a classifier without a padding token does not accept more.
        logits = torch.cat([model(input_ids=row, use_cache=False).logits for row in rows.split(1)])
    save_file({"logits": logits}, job["logits"])
    answer = {}
    if not job["classify"]:
        prompt = rows[:1, : rows.shape[1] // 2]
        settings = {"max_new_tokens": job["new_tokens"], "do_sample": False, "pad_token_id": 0}
        answer["greedy"] = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **settings)
        answer["greedy"] = answer["greedy"][0].tolist()
    if job["text"] is not None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **({} if job["adapter"] else trust))
        answer["ids"] = tokenizer(job["text"])["input_ids"]
    scope = {}
    exec(job["code"], scope)  # the code on the card
    try:
        exec(job["verifying"], scope)
    except AssertionError as error:
        answer["fault"] = str(error)
    with open(job["answer"], "w", encoding="utf-8") as file:
        json.dump(answer, file)


if __name__ == "__main__":
    sys.meta_path.insert(0, NotInstalled())
    sys.addaudithook(forbid_network)
    main(sys.argv[1])

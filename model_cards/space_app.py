"""A page to try a model: a conversation, a text to continue, or a text to classify."""

import itertools

import gradio
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

MODEL = "user/name"
OPTIONS = {"revision": "main", "trust_remote_code": True}  # the commit that was verified when it was published
NEW_TOKENS = 200
NOTE = "A small language model. What it writes may be wrong."

config = AutoConfig.from_pretrained(MODEL, **OPTIONS)
tokenizer = AutoTokenizer.from_pretrained(MODEL, **OPTIONS)
is_classifier = config.architectures[0].endswith("ForSequenceClassification")
auto_class = AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM
model = auto_class.from_pretrained(MODEL, dtype=torch.float32, **OPTIONS).eval()
longest = config.max_position_embeddings - (not is_classifier)  # leaves room for a generated token


def fits(inputs) -> bool:
    """Whether a text fits in the model's context; shows a warning if it does not."""
    length = inputs["input_ids"].shape[1]
    if length > longest:
        gradio.Warning(f"The text has {length} tokens: shorten it to at most {longest}.")
    return length <= longest


def generate(inputs) -> str:
    """The likeliest continuation; empty if the text is too long."""
    if not fits(inputs):
        return ""
    length = inputs["input_ids"].shape[1]
    limit = min(NEW_TOKENS, config.max_position_embeddings - length)
    output = model.generate(**inputs, max_new_tokens=limit, do_sample=False)
    return tokenizer.decode(output[0, length:], skip_special_tokens=True)


def read(turn) -> str:
    """The text of a turn, which gradio may pass in parts."""
    content = turn["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def answer(text: str, history: list) -> str:
    """The answer to a message; the oldest turns are left out when the context is full."""
    if any(token in text for token in tokenizer.all_special_tokens):
        gradio.Warning("The message contains a special token: remove it.")
        return ""
    messages = [{"role": "user", "content": text}]
    for question, reply in reversed(list(itertools.pairwise(history))):
        if (question["role"], reply["role"]) == ("user", "assistant") and read(reply):  # else it was refused
            messages = [{"role": turn["role"], "content": read(turn)} for turn in (question, reply)] + messages
    while True:
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        if inputs["input_ids"].shape[1] <= longest or len(messages) == 1:
            return generate(inputs)
        messages = messages[2:]


def continue_text(text: str) -> str:
    """A text and its continuation."""
    return text + generate(tokenizer(text or tokenizer.eos_token, return_tensors="pt"))


def classify(text: str) -> dict:
    """The probability of each class."""
    inputs = tokenizer(text or tokenizer.eos_token, return_tensors="pt")
    if not fits(inputs):
        return {}
    with torch.no_grad():
        probabilities = model(**inputs).logits[0].softmax(-1).tolist()
    return {config.id2label[index]: probability for index, probability in enumerate(probabilities)}


if is_classifier:
    page = gradio.Interface(classify, gradio.Textbox(label="Text"), gradio.Label(label="Classes"), title=MODEL)
elif tokenizer.chat_template:
    # Text is shown as it is: images in Markdown could be on other hosts.
    page = gradio.ChatInterface(answer, chatbot=gradio.Chatbot(render_markdown=False), title=MODEL, description=NOTE)
else:
    boxes = gradio.Textbox(label="Text", lines=8), gradio.Textbox(label="Continuation", lines=8)
    page = gradio.Interface(continue_text, *boxes, title=MODEL, description=NOTE)

if __name__ == "__main__":
    page.launch()

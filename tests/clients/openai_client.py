"""Talks to our server with the `openai` Python package: what a program written for OpenAI's API does must work.

    pip install -r tests/clients/requirements.txt
    python tests/clients/openai_client.py --binary target/release/dsv3-pipeline demo/

The folder needs a tokenizer with role marks (any model of pipelines/full.yaml; `hf_parity.py` says how to get one). Starts
the server, or takes `--url`. Every line printed is a check that held; the first that does not ends it with an error. The
committed result is openai_client.txt.
"""

import argparse
import asyncio
import importlib.metadata
import math
import subprocess
import sys

import openai

PROMPT = "Sam has 6 shells. Buys 6 shells. Gives 4 shells."
MESSAGES = [{"role": "user", "content": PROMPT + " Wins 3 shells. Total?"}]


def check(name, held, shown=""):
    if not held:
        sys.exit(f"FAILED: {name}: {shown}")
    print(f"ok  {name}" + (f": {shown}" if shown != "" else ""))


def completions(client, model):
    reply = client.completions.create(model=model, prompt=PROMPT, max_tokens=12, temperature=0)
    choice, usage = reply.choices[0], reply.usage
    check("completion", choice.finish_reason in ("length", "stop") and reply.object == "text_completion", repr(choice.text))
    check("usage", usage.total_tokens == usage.prompt_tokens + usage.completion_tokens and usage.prompt_tokens > 0,
          f"{usage.prompt_tokens} + {usage.completion_tokens}")
    stream = list(client.completions.create(
        model=model, prompt=PROMPT, max_tokens=12, temperature=0, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].text for chunk in stream if chunk.choices)
    reasons = [chunk.choices[0].finish_reason for chunk in stream if chunk.choices]
    check("completion, streamed", text == choice.text and len(stream) > 3, f"{len(stream)} events, the same text")
    check("one finish reason, at the end", reasons[-1] == choice.finish_reason and not any(reasons[:-1]))
    check("usage in the last event", stream[-1].usage == usage and not any(chunk.usage for chunk in stream[:-1]))

    with_logprobs = client.completions.create(
        model=model, prompt=PROMPT, max_tokens=6, temperature=0, logprobs=3, echo=True)
    logprobs = with_logprobs.choices[0].logprobs
    check("logprobs with echo", logprobs.token_logprobs[0] is None and all(p <= 0 for p in logprobs.token_logprobs[1:])
          and len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == len(logprobs.top_logprobs),
          f"{len(logprobs.tokens)} tokens")
    check("echo begins with the prompt", with_logprobs.choices[0].text.startswith(PROMPT))
    ids = client.completions.create(model=model, prompt=[10, 20, 30], max_tokens=3, temperature=0)
    check("token ids as prompt", ids.usage.prompt_tokens == 3, repr(ids.choices[0].text))
    many = client.completions.create(model=model, prompt=[PROMPT, "To be, or"], n=2, max_tokens=4, temperature=0)
    texts = [choice.text for choice in many.choices]
    check("two prompts, n = 2", [choice.index for choice in many.choices] == [0, 1, 2, 3]
          and texts[0] == texts[1] and texts[2] == texts[3], repr(texts[::2]))

    letter = next(char for char in reversed(choice.text) if not char.isspace())
    stopped = client.completions.create(model=model, prompt=PROMPT, max_tokens=12, temperature=0, stop=[letter])
    check("stop", stopped.choices[0].finish_reason == "stop" and stopped.choices[0].text == choice.text.split(letter)[0],
          f"before {letter!r}: {stopped.choices[0].text!r}")

    def drawn(seed):
        return client.completions.create(
            model=model, prompt=PROMPT, max_tokens=12, temperature=1, top_p=0.9, seed=seed).choices[0].text

    check("a seed repeats", drawn(5) == drawn(5), repr(drawn(5)))
    check("seeds differ", len({drawn(seed) for seed in range(6)}) > 1)


def chat(client, model):
    reply = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=24, temperature=0)
    message = reply.choices[0].message
    check("chat", message.role == "assistant" and reply.object == "chat.completion", repr(message.content))
    stream = list(client.chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=24, temperature=0, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    check("chat, streamed", text == message.content and stream[0].object == "chat.completion.chunk", f"{len(stream)} events")
    check("usage of the stream", stream[-1].usage == reply.usage)
    newer = client.chat.completions.create(model=model, messages=MESSAGES, max_completion_tokens=24, temperature=0)
    check("max_completion_tokens", newer.choices[0].message.content == message.content)
    scored = client.chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=4, temperature=0, logprobs=True, top_logprobs=2)
    content = scored.choices[0].logprobs.content
    check("chat logprobs", 0 < len(content) <= 4 and all(len(token.top_logprobs) == 2 for token in content)
          and math.isclose(content[0].logprob, content[0].top_logprobs[0].logprob, abs_tol=1e-6),
          repr([token.token for token in content]))
    parts = [{"role": "system", "content": "Think step by step."},
             {"role": "user", "content": [{"type": "text", "text": MESSAGES[0]["content"]}]}]
    reply = client.chat.completions.create(model=model, messages=parts, max_tokens=8, temperature=0, n=2, seed=1)
    check("system message, content parts, n = 2", len(reply.choices) == 2 and reply.choices[0].message.content is not None)


def models(client, model):
    check("models", [entry.id for entry in client.models.list()] == [model], model)
    check("one model", client.models.retrieve(model).id == model)


def errors(client, model):
    def refused(kind, **request):
        try:
            client.completions.create(**{"model": model, "prompt": PROMPT, **request})
        except kind as error:
            check(f"{kind.__name__}", error.body["message"] and error.status_code in (400, 404), error.body["message"])
        else:
            sys.exit(f"FAILED: {request} was taken")

    refused(openai.BadRequestError, temperature=-1)
    refused(openai.BadRequestError, max_tokens=10**6)
    refused(openai.BadRequestError, prompt=[])
    refused(openai.BadRequestError, prompt=[10**7])
    refused(openai.BadRequestError, stop=[""])
    refused(openai.BadRequestError, logprobs=99)
    refused(openai.NotFoundError, model="gpt-4")
    try:
        client.chat.completions.create(model=model, messages=[])
    except openai.BadRequestError as error:
        check("BadRequestError of chat", error.param == "messages", error.body["message"])


async def concurrent(url, model):
    async with openai.AsyncOpenAI(base_url=url, api_key="none") as client:
        async def one(seed):
            parts = await client.completions.create(
                model=model, prompt=PROMPT, max_tokens=10, temperature=1, seed=seed, stream=True)
            return "".join([chunk.choices[0].text async for chunk in parts if chunk.choices])

        alone = [await one(seed) for seed in range(8)]
        together = await asyncio.gather(*(one(seed) for seed in range(8)))
        check("eight streams at once say what each says alone", alone == together)


def talk(url):
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    model = next(iter(client.models.list())).id
    models(client, model)
    completions(client, model)
    chat(client, model)
    errors(client, model)
    asyncio.run(concurrent(url, model))


def main():
    parser = argparse.ArgumentParser(description="see the head of this file")
    parser.add_argument("--binary", help="dsv3-pipeline")
    parser.add_argument("--url", help="a running server, such as http://127.0.0.1:8000/v1")
    parser.add_argument("folder", nargs="?")
    args = parser.parse_args()
    print("python", sys.version.split()[0], "openai", importlib.metadata.version("openai"))
    if args.url:
        return talk(args.url)
    command = [args.binary, "serve", "--model", args.folder, "--port", "0", "--name", "demo"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        talk("http://" + server.stdout.readline().strip().rsplit("http://", 1)[1] + "/v1")
    finally:
        server.terminate()
        server.wait(timeout=10)


if __name__ == "__main__":
    main()

"""The device runtime inside an app: ask a question, stream the answer.

python examples/app.py OUT/device 127.0.0.1:7070 dev-cert.pem "Why is the sky blue?"
"""

import sys

from isthmus import EdgeModel, IsthmusError, Sampling

folder, server, certificate, question = sys.argv[1:]
try:
    model = EdgeModel.open(folder, server=server, tls_ca=certificate, codec="tabq")
    messages = [{"role": "user", "content": question}]
    with model.stream(messages, max_new_tokens=64, sampling=Sampling(temperature=0.7, top_p=0.9, seed=1)) as stream:
        for text in stream:
            print(text, end="", flush=True)
    print(f"\n({stream.result.decode_tokens_per_s:.1f} tokens/s, {stream.result.bytes_up} bytes sent)")
except IsthmusError as error:
    sys.exit(f"error: {error}")

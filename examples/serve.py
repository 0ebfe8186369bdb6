"""A server started from Python: it runs in the background of your own program.

python examples/serve.py OUT/server 127.0.0.1:7070
"""

import sys

from isthmus import BackServer

folder, listen = sys.argv[1:]
with BackServer.from_bundle(folder, listen) as server:
    print(f"serving on {server.address} ({server.security.describe()})", flush=True)
    try:
        server.wait()
    except KeyboardInterrupt:
        print("stopped")

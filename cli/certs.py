"""Make certificates for servers and devices, and revoke them.

`certs ca DIR` makes an authority, once. `certs server DIR HOST…` and `certs device DIR NAME` issue certificates;
servers get the first kind and DIR/ca-cert.pem (`isthmus serve --tls-cert --tls-key --client-ca --revoked`), devices the
second and DIR/ca-cert.pem (`isthmus generate --cert --key --tls-ca`). `certs revoke DIR FILE` puts one on the list,
which running servers notice by themselves.

`certs token FILE NAME` makes a token in place of a certificate (`isthmus serve --tokens FILE`) and prints it, once; the
device keeps it in a file of its own (`isthmus generate --token-file`).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..runtime.wire.authority import Issued


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    ca = actions.add_parser("ca", help="make an authority")
    ca.add_argument("folder", metavar="DIR", help="where it is kept; its key must stay there")
    ca.add_argument("--name", default="isthmus", help="shown in certificates (default %(default)s)")
    ca.add_argument("--days", type=float, default=3650.0, metavar="N", help="until it expires (default 3650)")
    server = actions.add_parser("server", help="issue a server's certificate")
    server.add_argument("folder", metavar="DIR", help="of the authority")
    server.add_argument("hosts", nargs="+", metavar="HOST", help="each name or address that clients use")
    server.add_argument("--days", type=float, default=365.0, metavar="N", help="until it expires (default 365)")
    device = actions.add_parser("device", help="issue a device's certificate")
    device.add_argument("folder", metavar="DIR", help="of the authority")
    device.add_argument("name", metavar="NAME", help="the device's identity")
    device.add_argument("--days", type=float, default=30.0, metavar="N", help="until it expires (default 30)")
    revoke = actions.add_parser("revoke", help="revoke a certificate")
    revoke.add_argument("folder", metavar="DIR", help="of the authority")
    revoke.add_argument("certificate", metavar="FILE|SERIAL", help="its file, or its serial number in hexadecimal")
    token = actions.add_parser("token", help="issue a token")
    token.add_argument("file", metavar="FILE", help="of the server's tokens; made if it is not there")
    token.add_argument("name", metavar="NAME", help="the device's identity")
    for each in (ca, server, device, revoke, token):
        each.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    """Do what the action says, and print what was written."""
    if args.action == "token":
        return _token(args)
    from ..runtime.wire.authority import REVOKED, Authority

    if args.action == "revoke":
        authority = Authority(args.folder)
        serials = authority.revoke(args.certificate)
        path = str(authority.folder / REVOKED)
        if args.json:
            print(json.dumps({"revoked": serials, "file": path}))
        else:
            print(f"{path}: {len(serials)} revoked")
        return 0
    if args.action == "ca":
        issued = Authority.create(args.folder, args.name, days=args.days)
    elif args.action == "server":
        issued = Authority(args.folder).server(args.hosts, days=args.days)
    else:
        issued = Authority(args.folder).device(args.name, days=args.days)
    print(json.dumps(asdict(issued)) if args.json else _table(issued))
    return 0


def _token(args: argparse.Namespace) -> int:
    from ..runtime.wire.tokens import issue_token

    token = issue_token(args.file, args.name)
    print(json.dumps({"name": args.name, "token": token, "file": args.file}) if args.json else token)
    return 0


def _table(issued: Issued) -> str:
    from tabulate import tabulate

    return tabulate([[name.replace("_", " "), value] for name, value in asdict(issued).items()], tablefmt="plain")

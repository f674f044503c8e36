#!/usr/bin/env python3
"""Make and edit pictures through OpenAI's images API or any relay that speaks it.

    argv -> Args -> Settings -> checked Request -> planned paths -> job folder
         -> curl -> Reply -> images on disk -> stdout

    gpt_image2.py generate "a cat on a windowsill" --sandbox      # no key needed
    gpt_image2.py generate "a red fox in snow" -s widescreen@2K -o fox.png
    gpt_image2.py edit fox.png "make it winter" --quality low

It needs Python 3.8 or newer and curl, nothing else. A picture costs money and takes minutes, so no
paid picture is ever lost, none is paid for twice by surprise, and no key ever shows.

The sections stand in the order of the pipeline; each uses only what is above it:
Facts, Failures, Values, Console, Pictures as bytes, Sizes, Settings, Requests, Planned paths,
Job folders, Curl, Replies, Verdicts, Downloads, Saving, Preview, Cost, One request, Reports,
Jobs files, Journal, Batch, Deferred, Gallery, Sandbox, Commands, Command line, Completion, Main.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from _thread import allocate_lock, get_ident
from stat import S_ISDIR
from typing import IO, Any, Callable, Dict, Iterable, Iterator, Mapping, NamedTuple, Sequence, Tuple

__version__ = "0.1.0"

################################################################################
# Facts
################################################################################
# Tables, each with its source and date: a model launch or a new relay is a change of data here.
# SDK is the `openai` package 3.52.0, HK is OpenAI-HK's document, NK is NodeKey's; 2026-11-21.

EXIT_OK = 0
EXIT_REFUSED = 1  # the server refused the request for another reason, or anything else
EXIT_USAGE = 2  # nothing sent
EXIT_CONFIG = 3  # nothing sent
EXIT_AUTH = 4
EXIT_POLICY = 5
EXIT_LIMIT = 6
EXIT_NETWORK = 7  # nothing was sent
EXIT_UNKNOWN = 8  # may be billed
EXIT_PARTIAL = 9
EXIT_UNSAVED = 10  # the answer is kept: recover

ENDPOINTS = {"generate": "generations", "edit": "edits"}  # of /v1/images, by command
PROGRAM = "gpt-image2"
OPENAI_URL = "https://api.openai.com/v1"
MEGABYTE = 1024 * 1024
MAX_INPUT_BYTES = 50 * MEGABYTE  # each image of an edit (SDK)
MAX_INPUT_IMAGES = 16  # SDK
MASK_WARN_BYTES = 4 * MEGABYTE  # SDK says below 4 MB, the guide below 50
# How long a picture takes: the old skill's page and new-api#4920.
USUAL_TIMES = {
    "gpt-image-2.6-flare": "8 to 12 s",
    "low": "10 to 70 s",
    "medium": "50 to 120 s",
    "high": "2 to 5 min",
    "auto": "10 s to 5 min",
}
MAX_DOWNLOAD_BYTES = 100 * MEGABYTE
MAX_PROMPT_CHARACTERS = 32_000  # SDK
ANSWER_BYTES = 40 * MEGABYTE  # what one 4K picture in base64 may take in an answer
MAX_WAIT_SECONDS = 120  # a longer Retry-After is not waited for, as in the official SDK
STOP_GRACE_SECONDS = 10.0  # what an answer that has begun gets after Ctrl-C
ACCOUNT_REFUSALS = 10  # so many jobs in a row, refused for the key or the account, end a batch
KEEP_EMPTY_DAYS = 7
WINDOW = 256 * 1024  # bytes read at once; 128 KB to 1 MB are best (measured)
LONG_STRING = 64 * 1024  # a JSON string over this many bytes stays in the file
MAX_SKELETON_BYTES = 8 * MEGABYTE  # an answer's text without its long strings


def table_rows(text: str) -> Iterator[list[str]]:
    """Yield the rows of a text table as lists of its cells."""
    for line in text.strip().splitlines():
        yield [cell.strip() for cell in line.split("|")]


class Provider(NamedTuple):
    """What is known of one server; `strict`: OpenAI's rules are certain there."""

    name: str
    base_url: str
    hosts: tuple[str, ...] = ()
    key_env: str = ""  # what config --init names
    auth_header: str = "Authorization: Bearer"
    currency: str = ""
    strict: bool = False
    answers_url: bool = False


# Name, base URL, hosts, the key's variable, auth header, currency, marks; HK and NK of 2026-11-21.
# Azure: its v1 API, where the model is the deployment's name.
PROVIDERS = {
    name: Provider(
        name,
        url,
        tuple(hosts.split()),
        key_env,
        header or "Authorization: Bearer",
        currency,
        "strict" in marks,
        "url" in marks,
    )
    for name, url, hosts, key_env, header, currency, marks in table_rows("""
openai    | https://api.openai.com/v1    | api.openai.com    | OPENAI_API_KEY    | | USD | strict
openai-hk | https://api.openai-hk.com/v1 | api.openai-hk.com | OPENAI_HK_API_KEY | | credits | url
nodekey   | https://nodekey.xinghanyun.cn/v1 | nodekey.xinghanyun.cn | NODEKEY_API_KEY | | |
azure | | .openai.azure.com .cognitiveservices.azure.com | AZURE_OPENAI_API_KEY | api-key | |
generic   |                              |                   |                   | |     |
""")
}
# What config --init writes beside base_url and api_key_env.
TEMPLATES = {
    "openai-hk": {"size": "1024x1024", "quality": "low"},
    "azure": {
        "base_url": "https://YOUR-RESOURCE.openai.azure.com/openai/v1",
        "auth_header": "api-key",
        "model": "YOUR-DEPLOYMENT",
    },
}


class Model(NamedTuple):
    """One model id: `sizes` empty means the flexible rule; `owner` is who enforces its rules."""

    sizes: tuple[str, ...] = ()
    family: str = "2"
    owner: str = "openai"
    ends: str = ""  # the day it is, or was, shut down


OLD_SIZES = ("1024x1024", "1536x1024", "1024x1536")
# SDK and OpenAI's deprecations page; NodeKey's four: NK.
MODELS = {
    "gpt-image-2": Model(),
    "gpt-image-2-2026-04-21": Model(),
    "gpt-image-2.5-flare": Model(family="2.5"),
    "gpt-image-2.5-flare-2026-09-08": Model(family="2.5"),
    "gpt-image-2.5-sunburst": Model(family="2.5"),
    "gpt-image-2.5-sunburst-2026-09-08": Model(family="2.5"),
    "gpt-image-2.6-flare": Model(family="2.6"),
    "gpt-image-2.6-sunburst": Model(family="2.6"),
    "gpt-image-1.5": Model(OLD_SIZES, "1.5", ends="2026-12-01"),
    "chatgpt-image-latest": Model(OLD_SIZES, "1.5", ends="2026-12-01"),
    "gpt-image-1-mini": Model(OLD_SIZES, "1-mini", ends="2026-12-01"),
    "gpt-image-1": Model(OLD_SIZES, "1", ends="2026-10-23"),
    "dall-e-3": Model(("1024x1024", "1792x1024", "1024x1792"), "dall-e", ends="2026-05-12"),
    "dall-e-2": Model(("256x256", "512x512", "1024x1024"), "dall-e", ends="2026-05-12"),
    "gpt-image-2-vip": Model(owner="nodekey"),
    "gpt-image-2-1k": Model(OLD_SIZES, owner="nodekey"),
    "gpt-image-2-2k": Model(("2048x2048", "2048x1152"), owner="nodekey"),
    "gpt-image-2-4k": Model(("3840x2160", "2160x3840"), owner="nodekey"),
}
DEFAULT_MODEL = "gpt-image-2"

# Ratio, name, and the sizes of the tiers 1K, 2K and 4K (HK and the guide).
SIZES = (
    ("1:1", "square", (1024, 1024), (2048, 2048), (2880, 2880)),
    ("16:9", "widescreen", (1280, 720), (2048, 1152), (3840, 2160)),
    ("9:16", "story", (720, 1280), (1152, 2048), (2160, 3840)),
    ("5:4", "print", (1040, 832), (2080, 1664), (3200, 2560)),
    ("4:5", "feed", (832, 1040), (1664, 2080), (2560, 3200)),
    ("4:3", "classic", (1024, 768), (2048, 1536), (3264, 2448)),
    ("3:4", "vertical", (768, 1024), (1536, 2048), (2448, 3264)),
    ("3:2", "photo", (1008, 672), (2064, 1376), (3504, 2336)),
    ("2:3", "portrait", (672, 1008), (1376, 2064), (2336, 3504)),
    ("21:9", "exclusive", (1344, 576), (2016, 864), (3808, 1632)),
)
TIERS = ("1K", "2K", "4K")
TIER_PIXELS = (1024 * 1024, 2048 * 2048, 8_294_400)
# The flexible rule of gpt-image-2, 2.5 and (assumed) 2.6: HK and the guide.
SIDE_STEP = 16
MAX_SIDE = 3840
MAX_RATIO = 3
MIN_PIXELS = 655_360
MAX_PIXELS = 8_294_400

# Format as the API spells it: suffixes (the first is ours) and media type.
FORMATS = {
    "png": (("png",), "image/png"),
    "jpeg": (("jpg", "jpeg", "jpe"), "image/jpeg"),
    "webp": (("webp",), "image/webp"),
    "gif": (("gif",), "image/gif"),
    "svg": (("svg",), "image/svg+xml"),
}
SUFFIX_FORMATS = {suffix: name for name, row in FORMATS.items() for suffix in row[0]}


class Field(NamedTuple):
    """One field of the API and its option. `kind`: a word that stands for text, SIZE, low..high
    for a whole number, or the closed set of values."""

    name: str  # as the API spells it; dots nest
    option: str
    kind: str
    endpoints: str
    help: str

    @property
    def dest(self) -> str:
        """The attribute that argparse stores it under."""
        return self.option.split()[-1].lstrip("-").replace("-", "_")


# SDK types image_generate_params.py and image_edit_params.py of 3.52.0; g: generations, e: edits.
FIELDS = tuple(
    Field(*row)
    for row in table_rows("""
model              | -m --model          | NAME     | ge | default gpt-image-2
size | -s --size | SIZE | ge | 1536x1024 2K 16:9@4K story@2K; default: server's
quality | --quality | auto low medium high xhigh max | ge | low for drafts; default: server's
n                  | -n --n              | 1..10    | ge | how many pictures (default 1)
output_format      | -f --format  | png jpeg webp gif svg | ge | default: what the -o suffix says
output_compression | --compression | 0..100 | ge | quality of a jpeg or webp file (default 100)
background|--background|auto opaque transparent|ge|transparent needs png or webp (default auto)
moderation | --moderation | auto low | ge | how strict the content policy is (default auto)
complexity | --complexity | low medium high | ge | how much is in the picture; 2.6 only
frame_count        | --frame-count       | 2..16    | ge | pictures in a gif
frame_duration_ms  | --frame-duration-ms | 1..655350 | ge | how long each is shown in a gif
svg.model          | --svg-model         | NAME     | ge | the model that writes the svg
svg.reasoning.effort|--svg-effort|none minimal low medium high xhigh max|ge|how long it may think
safety_identifier  | --safety-identifier | ID       | ge | a stable id of your end user
user               | --user              | ID       | ge | the older name of --safety-identifier
response_format    | --response-format   | url b64_json | ge | how relays shall send the picture
stream             | --stream            |          | ge | answer as events: keeps the line busy
partial_images     | --partial-images    | 0..3     | ge | save previews too; implies --stream
input_fidelity | --input-fidelity | low high | e | how much of the input stays; 1.5 and 1-mini
""")
)


class CurlExit(NamedTuple):
    """What one exit code of curl means when no whole answer came."""

    sentence: str
    hint: str = ""
    retry: bool = False  # worth another try where nothing was sent
    unsent: bool = False  # no byte of the POST has left, whatever the figures say


# Codes seen with ten curl versions from 7.29 to 8.20, 2026-11-21.
# Marks: r, worth another try where nothing was sent; u, no byte of the POST has left, whatever
# curl's figures say (a CONNECT to a proxy counts as sent).
CURL_EXITS = {
    int(code): CurlExit(sentence, hint, "r" in marks, "u" in marks)
    for code, marks, sentence, hint in table_rows("""
1   |    | the server did not answer in HTTP              | check base_url
2   | u  | curl refused its settings                      | this is a bug, or a very old curl
3   | u  | curl found the URL malformed                   | check base_url
5   | ru | the proxy's name could not be resolved         | check proxy
6   | ru | the host's name could not be resolved          | check base_url and the network
7   | ru | nothing accepts connections there              | check base_url, network, proxy
16  |    | the connection broke (HTTP/2)                  |
18  |    | the answer was cut off                         |
23  |    | the answer could not be written                | the disk is full or the folder is gone
26  |    | curl could not read a file that it was to send |
27  |    | curl ran out of memory                         |
28  |    | no full answer came in time                    | raise --timeout or lower --quality
33  |    | the server does not resume downloads           |
35  | ru | the TLS handshake failed                       | plain http behind https? a proxy?
47  |    | too many redirects                             |
52  |    | the connection closed without an answer        |
55  |    | the connection broke while sending             |
56  |    | the connection broke while receiving           |
60  | u  | the server's certificate is not trusted        | set cacert to its CA file
63  |    | the file is larger than the limit              |
77  | u  | the CA file cannot be read                     | check cacert
92  |    | the connection broke (HTTP/2)                  |
97  | u  | the proxy refused the connection               | check proxy
100 |    | the answer's headers are absurdly large        |
""")
}
CONNECT_TIMEOUT = CurlExit("no connection in time", "check base_url, network, proxy", True)
NOT_STARTED = CurlExit("no connection had come about", "", True)

# The API's error codes (SDK, and threads named in each hint's place): exit code, hint.
POLICY_HINT = "the content policy refused it: change the prompt or the pictures"
QUOTA_HINT = "add credit or raise the limit of this account"
BUSY_HINT = "wait and run the same command again"
API_ERRORS = {
    code: (exit_code, hint)
    for exit_code, hint, codes in (
        (EXIT_POLICY, POLICY_HINT, "moderation_blocked content_policy_violation"),
        (EXIT_LIMIT, QUOTA_HINT, "billing_hard_limit_reached insufficient_quota"),
        (EXIT_LIMIT, QUOTA_HINT, "insufficient_user_quota credit_balance_exhausted"),
        (EXIT_LIMIT, QUOTA_HINT, "organization_spend_limit_exceeded project_spend_limit_exceeded"),
        (EXIT_LIMIT, QUOTA_HINT, "organization_usage_limit_exceeded"),
        (EXIT_LIMIT, BUSY_HINT, "rate_limit_exceeded slow_down server_is_overloaded"),
        (EXIT_AUTH, "check the key: config --check", "invalid_api_key"),
        (EXIT_REFUSED, "check --model", "model_not_found"),
        (EXIT_REFUSED, "leave out the option that the server does not know", "unknown_parameter"),
        (EXIT_REFUSED, "try --image-field 'image[]'", "duplicate_parameter"),
        (EXIT_REFUSED, "leave out --input-fidelity", "invalid_input_fidelity_model"),
        (EXIT_REFUSED, "", "invalid_value invalid_image_file invalid_request_error"),
    )
    for code in codes.split()
}
OVERLOAD_CODES = ("slow_down", "server_is_overloaded")
POLICY_MARK = "safety_violations="
UNVERIFIED_MARK = "must be verified"
STATUS_EXITS = {401: EXIT_AUTH, 402: EXIT_LIMIT, 403: EXIT_AUTH, 429: EXIT_LIMIT}
STATUS_HINTS = {
    401: "check the key: config --check",
    402: QUOTA_HINT,
    403: "the key or its organisation may not do this",
    404: "check base_url and --model",
    405: "check base_url",
    413: "the pictures are too large for this server",
    429: BUSY_HINT,
}
# A gateway in front of the server gave up; Cloudflare does so after about 100 s (new-api#4478).
GATEWAY_STATUSES = (502, 504, 520, 521, 522, 523, 524)
GATEWAY_HINT = "a gateway cut it; --stream --partial-images 1 keeps the line busy"

# Words that stand where a key belongs in examples.
PLACEHOLDER_KEY = re.compile(
    r"(sk|hk)-(\.{2,}|…|x{3,}|your.*)|your[-_ ]?.*key.*|<.*>|\$\{?\w*\}?|.*api[-_]key[-_]here", re.I
)
BIDI_CONTROLS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
UNPRINTABLE = re.compile(f"[\x00-\x1f\x7f-\x9f\u2028\u2029{BIDI_CONTROLS}]")

################################################################################
# Failures
################################################################################
# One exception for everything that a user, a server or a disk can cause; main prints it, once.


class Failure(Exception):
    """An expected failure: what happened (fact, value), the way out, and the exit code."""

    def __init__(
        self,
        message: str,
        exit_code: int = EXIT_USAGE,
        *,
        code: str = "",
        hint: str = "",
        maybe_billed: bool = False,
        http_status: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.exit_code = exit_code
        self.code = code or OUR_CODES.get(exit_code, OUR_CODES[EXIT_REFUSED])[0]
        self.hint = hint
        self.maybe_billed = maybe_billed
        self.http_status = http_status
        self.passing = False  # a call that costs nothing may do better next time

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


# The closed list of `error.code` values that are ours, where the API gives none, by exit code.
OUR_CODES: dict[int, tuple[str, ...]] = {
    EXIT_REFUSED: ("refused",),
    EXIT_USAGE: ("usage",),
    EXIT_CONFIG: ("config", "key_missing", "curl_missing"),
    EXIT_AUTH: ("unauthorized",),
    EXIT_POLICY: ("content_policy",),
    EXIT_LIMIT: ("limit",),
    EXIT_NETWORK: ("network",),
    EXIT_UNKNOWN: ("unknown_outcome", "no_image", "under_way"),
    EXIT_PARTIAL: ("partly_saved",),
    EXIT_UNSAVED: ("not_saved", "bad_image", "download_failed"),
    130: ("interrupted",),  # 129 and 143 too
}


class Interrupted(BaseException):
    """A signal asked us to stop. Not an Exception, so that no handler for faults eats it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def config_failure(message: str, hint: str = "") -> Failure:
    """Return the failure for settings, key or curl: exit 3, nothing sent."""
    return Failure(message, EXIT_CONFIG, hint=hint)


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean X?` for the closest known word, or nothing."""
    from difflib import get_close_matches

    close = get_close_matches(word.lower(), list(known), 1, 0.6)
    return f"; did you mean {close[0]}?" if close else ""


def os_reason(error: OSError) -> str:
    """Return the system's words for a fault, lower case: `no space left on device`."""
    return (error.strerror or str(error)).lower()


################################################################################
# Values
################################################################################
# What flows down the pipeline. A Request is checked when it exists; nothing below re-checks it.


class Args:
    """The command line as argparse fills it in; fields of the API stand under their option."""

    command: str
    words: list[str]
    output_dir: str | None = None
    port: int = 0
    concurrency: int = 4
    older_than: int = 7 * 86400  # seconds

    def __getattr__(self, name: str) -> Any:
        """An option that was not given, or that the command does not have."""
        if name.startswith("_"):
            raise AttributeError(name)
        return None


class PictureInfo(NamedTuple):
    """What a file's own bytes say: format as the API spells it, pixels, alpha, end marker seen."""

    format: str
    width: int
    height: int
    alpha: bool
    whole: bool


class Attachment(NamedTuple):
    """One file of an edit: the part's name, where it lies (or its bytes, for a drawn mask)."""

    field: str  # image, mask or markup
    path: str
    info: PictureInfo
    size: int  # bytes
    sha256: str
    data: bytes | None = None


class Request(NamedTuple):
    """A checked request: exactly what is sent, in the order in which it is sent."""

    command: str  # generate or edit
    endpoint: str  # generations or edits
    fields: tuple[tuple[str, Any], ...]  # API names, dots nest; the prompt among them
    files: tuple[Attachment, ...] = ()

    def get(self, name: str, default: Any = None) -> Any:
        """Return the value of one field."""
        return dict(self.fields).get(name, default)

    @property
    def total(self) -> int:
        """How many pictures are asked for."""
        n = self.get("n", 1)
        return n if isinstance(n, int) and n > 0 else 1

    @property
    def pixels(self) -> tuple[int, int] | None:
        """The size asked for as (width, height), or None for auto."""
        match = re.fullmatch("([0-9]+)x([0-9]+)", str(self.get("size", "")))
        return (int(match[1]), int(match[2])) if match else None


class Target(NamedTuple):
    """Where the pictures go: one exact name, generated names in a folder, or standard output."""

    folder: str  # absolute
    name: str  # "" means generated names
    stems: tuple[str, ...]  # generated names without suffix
    planned: int
    force: bool = False
    stdout: bool = False

    def path(self, index: int, suffix: str) -> str:
        """Return the planned path of picture `index` (from 0), whose bytes ask for `suffix`."""
        if not self.name:
            stem = self.stems[index] if index < len(self.stems) else f"{self.stems[0]}-{index + 1}"
            return os.path.join(self.folder, f"{stem}.{suffix}")
        stem, dot_suffix = os.path.splitext(self.name)
        number = f"-{index + 1}" if self.planned > 1 or index else ""
        return os.path.join(self.folder, f"{stem}{number}{dot_suffix}")


class Span(NamedTuple):
    """A long string that stays in the answer's file: its raw bytes between the quotes."""

    start: int
    end: int


class ImageSource(NamedTuple):
    """Where one picture of an answer is: base64 text (or its span), or a URL."""

    kind: str  # base64, url, or raw: the answer is the picture
    value: str | Span
    revised_prompt: str | None = None


class ApiError(NamedTuple):
    """An error as the server worded it."""

    code: str
    message: str
    type: str = ""


class Reply(NamedTuple):
    """What an answer's body holds, whatever its Content-Type said."""

    kind: str  # json, events, picture, html, text or empty
    images: tuple[ImageSource, ...] = ()
    error: ApiError | None = None
    usage: dict[str, Any] | None = None
    whole: bool = False  # parsed to its end
    excerpt: str = ""  # its first characters, for messages


class CurlEnd(NamedTuple):
    """How one curl process ended: its exit code (None: not known) and its own figures."""

    code: int | None
    status: int = 0
    sent: int = 0  # bytes of the request that left
    message: str = ""
    seconds: float = 0.0
    signal: int = 0  # the signal for which we stopped it


class Verdict(NamedTuple):
    """What one attempt came to: ok, refused, unsent or unknown (may be billed)."""

    kind: str
    failure: Failure | None = None
    retry: bool = False  # certain that it was not served, and worth another try
    wait: float | None = None  # seconds that the server asked for


class Picture(NamedTuple):
    """One picture on disk."""

    path: str
    bytes: int
    format: str
    width: int
    height: int
    sha256: str
    revised_prompt: str | None = None


################################################################################
# Console
################################################################################
# The one door to the terminal: results on stdout, all else on stderr, nothing with a key in it.


def printable(text: str, limit: int = 1000) -> str:
    """Return text as one safe line: no control, escape or bidi characters, no lone surrogates."""
    text = UNPRINTABLE.sub(" ", text[: 4 * limit]).encode("utf-8", "replace").decode("utf-8")
    text = text.strip()
    return text if len(text) <= limit else text[: limit - 1] + "…"


def line_bytes(text: str) -> bytes:
    """Return a line for a stream: UTF-8, bytes of file names as they are on disk."""
    try:
        return f"{text}\n".encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # a lone surrogate that is no file name's byte
        return f"{text}\n".encode("utf-8", "replace")


def secret_forms(secret: str) -> list[str]:
    """Return the spellings in which a server may echo a secret: raw, URL-encoded, base64."""
    from binascii import b2a_base64

    raw = secret.encode("utf-8", "surrogateescape")
    # By hand, as every start comes by here and urllib.parse takes 2 ms.
    coded = re.sub(rb"[^\w.~-]", lambda match: b"%%%02X" % match[0][0], raw).decode("ascii")
    forms = [secret, coded, re.sub("%..", lambda match: match[0].lower(), coded)]
    for lead in range(3):  # inside a longer text it may begin at any of three bit positions
        tail = -(lead + len(raw)) % 3
        text = b2a_base64(bytes(lead) + raw + bytes(tail), newline=False).decode("ascii")
        forms.append(text[(0, 2, 3)[lead] : len(text) - (0, 2, 3)[tail]])
    return sorted(set(forms), key=len, reverse=True)


class Console:
    """Prints results and messages, and keeps the warnings for the JSON document."""

    def __init__(self, *, quiet: bool = False, verbose: bool = False, json: bool = False) -> None:
        self.quiet = quiet
        self.verbose = verbose
        self.json = json
        self.name = PROGRAM  # what leads a message
        self.warnings: list[str] = []
        self.secrets: list[str] = []
        self.stdout_is_data = False  # -o -: the picture's bytes own it
        self.on_line: Callable[[], None] = lambda: None  # clears a spinner first
        self.lock = allocate_lock()  # a batch's threads share the terminal

    @property
    def live(self) -> bool:
        """Whether a line on the terminal may be written over and over."""
        shown = not self.quiet and bool(sys.stderr) and sys.stderr.isatty()
        return shown and os.environ.get("TERM") != "dumb"

    def keep_secret(self, secret: str) -> None:
        """Blank this text, in all its spellings, in whatever is printed from now on."""
        if len(secret) >= 8:  # a shorter one guards nothing, and stands in any text
            self.secrets += secret_forms(secret)

    def scrub(self, text: str) -> str:
        """Return text with every secret blanked."""
        for secret in self.secrets:
            text = text.replace(secret, "****")
        return text

    def put(self, stream: Any, data: bytes) -> bool:
        """Write one line, alone; False where the stream is closed, full or a dead pipe."""
        with self.lock:
            self.on_line()
            return write_stream(stream, data)

    def error(self, text: str) -> None:
        """Print one line on stderr, with --quiet too."""
        self.put(sys.stderr, line_bytes(UNPRINTABLE.sub(" ", self.scrub(text))[:4000]))

    def say(self, text: str) -> None:
        """Print one line on stderr."""
        if not self.quiet:
            self.error(text)

    def warn(self, text: str) -> None:
        """Print a warning once and keep it for the JSON document."""
        if text not in self.warnings:
            self.warnings.append(self.scrub(text))
            if not self.quiet:
                self.error(f"{self.name}: warning: {text}")

    def emit(self, text: str) -> None:
        """Print one line of result on stdout; a stdout that is gone is told on stderr, once."""
        data = line_bytes(self.scrub(text))
        if not self.put(sys.stderr if self.stdout_is_data else sys.stdout, data):
            self.error(f"{PROGRAM}: stdout is closed or full; it would have said: {text[:500]}")

    def saved(self, picture: Picture) -> None:
        """Report one saved picture as soon as it is on disk."""
        if not self.json:
            kilobytes = max(1, round(picture.bytes / 1024))
            self.emit(f"Saved: {picture.path} ({kilobytes} KB)")

    def document(self, value: dict[str, Any]) -> None:
        """Print one JSON document on stdout."""
        self.emit(json.dumps(value, ensure_ascii=True))


class JobConsole(Console):
    """The console of one job in a batch: warnings of its own, its name before each message."""

    def __init__(self, parent: Console, label: str) -> None:
        super().__init__(quiet=parent.quiet, verbose=parent.verbose, json=parent.json)
        self.name, self.secrets = f"{PROGRAM}: {label}", parent.secrets
        self.put = parent.put  # type: ignore[method-assign]

    @property
    def live(self) -> bool:
        """A batch has one line for all its jobs."""
        return False

    def say(self, text: str) -> None:
        """Print one line on stderr, with --verbose only: a batch has many of each."""
        if self.verbose and not self.quiet:
            self.error(f"{self.name}: {text}")


def write_stream(stream: Any, data: bytes) -> bool:
    """Write bytes to stdout or stderr and flush; False where it is closed, full or a dead pipe."""
    try:
        stream.buffer.write(data)
        stream.buffer.flush()
    except (OSError, ValueError, AttributeError):
        silence(stream)
        return False
    return True


def silence(stream: Any) -> None:
    """Point a broken stream at the null device, so that Python's exit doesn't trip over it."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
    except (OSError, ValueError, AttributeError):
        pass


class Progress:
    """Shows that a long wait is alive: a spinner on a terminal, a line every 30 s elsewhere."""

    lead = "waiting: "

    def __init__(self, console: Console, usual: str = "") -> None:
        self.console = console
        self.usual = f" (usually {usual})" if usual else ""
        self.started = time.monotonic()
        self.live = console.live
        self.interval = 0.2 if self.live else 30.0
        self.shown = self.started
        self.turns = 0
        if self.live:
            console.on_line = self.clear

    def tick(self, received: int) -> None:
        """Show the seconds so far and the bytes that have come, if it is time to."""
        now = time.monotonic()
        if now - self.shown < self.interval * 0.9:
            return
        self.shown = now
        text = self.text(int(now - self.started), received)
        self.turns += 1
        if self.live:
            mark = "|/-\\"[self.turns % 4]
            with self.console.lock:
                write_stream(sys.stderr, f"\r\x1b[K{mark} {text}".encode())
        else:
            self.console.say(f"{self.lead}{text}")

    def text(self, seconds: int, received: int) -> str:
        """Return what is shown after so many seconds and bytes."""
        if received:
            return f"{seconds} s, {received // 1024} KB received"
        return f"{seconds} s{self.usual}"

    def clear(self) -> None:
        """Take the spinner off the line."""
        if self.live and self.turns:
            write_stream(sys.stderr, b"\r\x1b[K")

    def stop(self) -> None:
        """End the wait."""
        self.clear()
        self.console.on_line = lambda: None


class Signals:
    """INT, TERM and HUP. The first one ends a wait, and only that: whatever else we are at is done
    to its end. The second one leaves now, wherever we are.

        with SIGNALS:
            wait()  # raises Interrupted, also for a signal that came before
    """

    def __init__(self) -> None:
        self.number = 0
        self.waiting = False
        self.sent = False  # a curl has been started
        self.main = get_ident()  # signals reach this thread alone

    def install(self, handler: Any = None) -> None:
        """Take the signals over, but for those that our parent told us to ignore (nohup)."""
        import signal

        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number and signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, handler or self.handle)

    def ignore(self) -> None:
        """Let nothing change an exit code that is settled."""
        import signal

        self.install(signal.SIG_IGN)

    def handle(self, number: int, frame: object) -> None:
        """Note a signal; raise Interrupted in a wait, and for the second one."""
        again, self.number = self.number, number
        if self.waiting or again:
            raise Interrupted(number)

    def pause(self, seconds: float) -> None:
        """Sleep; in slices, as an exception can get lost in a destructor."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with self:
                time.sleep(max(0.0, min(1.0, end - time.monotonic())))

    def __enter__(self) -> None:
        try:  # waiting comes first: else a signal between the two would be noted and not heard
            self.waiting = self.waiting or self.in_main
            if self.number:
                raise Interrupted(self.number)
        except Interrupted:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        self.waiting = self.waiting and not self.in_main

    @property
    def in_main(self) -> bool:
        """Whether this is the thread that signals interrupt; any other has to look for them."""
        return get_ident() == self.main


SIGNALS = Signals()  # signals are the process's own, so there is one of these


################################################################################
# Pictures as bytes
################################################################################
# Magic bytes and end markers decide what a file is; the formats' own specifications are the source.

TAIL_BYTES = 64 * 1024  # an end marker may be followed by this much padding


def inspect_picture(file: IO[bytes]) -> PictureInfo | None:
    """Return what the bytes of an open file are, or None for something that is no picture."""
    file.seek(0, os.SEEK_END)
    size = file.tell()
    file.seek(max(0, size - TAIL_BYTES))
    tail = file.read(TAIL_BYTES)
    file.seek(0)
    head = file.read(4096)
    for inspect in (inspect_png, inspect_jpeg, inspect_webp, inspect_gif, inspect_svg):
        info = inspect(file, head, tail, size)
        if info:
            return info
    return None


def inspect_png(file: IO[bytes], head: bytes, tail: bytes, size: int) -> PictureInfo | None:
    """PNG: IHDR comes first; alpha is colour type 4 or 6, or a tRNS chunk ahead of the data."""
    if not head.startswith(b"\x89PNG\r\n\x1a\n") or head[12:16] != b"IHDR":
        return None
    width, height = int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
    alpha = head[25:26] in (b"\x04", b"\x06") or b"tRNS" in head.partition(b"IDAT")[0]
    return PictureInfo("png", width, height, alpha, b"IEND\xaeB`\x82" in tail)


def inspect_jpeg(file: IO[bytes], head: bytes, tail: bytes, size: int) -> PictureInfo | None:
    """JPEG: walk the segments to the frame header, past any amount of metadata."""
    if not head.startswith(b"\xff\xd8\xff"):
        return None
    position, width, height, scan = 2, 0, 0, 0
    while True:
        file.seek(position)
        segment = file.read(9)
        if len(segment) < 9 or segment[0] != 0xFF or segment[1] == 0xDA:
            scan = position if segment[1:2] == b"\xda" else size
            break
        if 0xC0 <= segment[1] <= 0xCF and segment[1] not in (0xC4, 0xC8, 0xCC):
            height = int.from_bytes(segment[5:7], "big")
            width = int.from_bytes(segment[7:9], "big")
        position += 1 if segment[1] == 0xFF else 2 + int.from_bytes(segment[2:4], "big")
    # A thumbnail in the metadata ends so too; in the scan itself FF is always stuffed.
    end = size - len(tail) + tail.rfind(b"\xff\xd9")
    return PictureInfo("jpeg", width, height, False, b"\xff\xd9" in tail and end > scan)


def inspect_webp(file: IO[bytes], head: bytes, tail: bytes, size: int) -> PictureInfo | None:
    """WebP: the RIFF length is the end marker; lossy, lossless and extended headers differ."""
    if head[:4] != b"RIFF" or head[8:12] != b"WEBP":
        return None
    whole = int.from_bytes(head[4:8], "little") + 8 <= size
    kind = head[12:16]
    if kind == b"VP8X":
        width, height = (int.from_bytes(head[at : at + 3], "little") + 1 for at in (24, 27))
        return PictureInfo("webp", width, height, bool(head[20:21] > b"\x0f"), whole)
    if kind == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        return PictureInfo("webp", width, height, bool(bits >> 28 & 1), whole)
    width, height = (int.from_bytes(head[at : at + 2], "little") & 0x3FFF for at in (26, 28))
    return PictureInfo("webp", width, height, False, whole)


def inspect_gif(file: IO[bytes], head: bytes, tail: bytes, size: int) -> PictureInfo | None:
    """GIF: ends in a semicolon byte, at times followed by zeros."""
    if head[:6] not in (b"GIF87a", b"GIF89a"):
        return None
    width, height = (int.from_bytes(head[at : at + 2], "little") for at in (6, 8))
    return PictureInfo("gif", width, height, False, tail.rstrip(b"\0")[-1:] == b";")


SVG_PROLOG = re.compile(
    rb"\s+|<\?.*?\?>|<!--.*?-->|<!DOCTYPE\s+svg[^>\[]*(?:\[[^\]]*\])?\s*>", re.I | re.S
)
SVG_START = re.compile(rb"<svg[\s>]", re.I)


def inspect_svg(file: IO[bytes], head: bytes, tail: bytes, size: int) -> PictureInfo | None:
    """SVG: its root element comes first, so that a web page with a drawing in it is none."""
    text, position = head[3:] if head.startswith(b"\xef\xbb\xbf") else head, 0
    item = SVG_PROLOG.match(text)
    while item:
        position = item.end()
        item = SVG_PROLOG.match(text, position)
    start = SVG_START.match(text, position)
    if not start:
        return None
    tag = text[start.end() - 1 :].partition(b">")[0]
    numbers = [
        re.search(rb"\s%s\s*=\s*[\"']([\d.]+)(?:px)?[\"']" % k, tag) for k in (b"width", b"height")
    ]
    box = re.search(rb"\sviewBox\s*=\s*[\"'][-\d.]+[ ,]+[-\d.]+[ ,]+([\d.]+)[ ,]+([\d.]+)", tag)
    if numbers[0] and numbers[1]:
        sides = (numbers[0][1], numbers[1][1])
    else:
        sides = (box[1], box[2]) if box else (b"0", b"0")
    width, height = (round(float(side)) if side.count(b".") < 2 else 0 for side in sides)
    rest = re.sub(rb"<!--.*?-->|\s", b"", tail.rpartition(b"</svg")[2], flags=re.S)
    return PictureInfo("svg", width, height, True, rest == b">")


def draw_mask(width: int, height: int, box: tuple[int, int, int, int]) -> bytes:
    """Return a PNG of an opaque black picture with one transparent box (x, y, width, height)."""
    left, top, box_width, box_height = box
    solid = b"\0" + b"\0\0\0\xff" * width
    edge = 1 + 4 * left
    holed = solid[:edge] + bytes(4 * box_width) + solid[edge + 4 * box_width :]
    inside = range(top, top + box_height)
    return encode_png(width, height, 6, (holed if y in inside else solid for y in range(height)))


def encode_png(
    width: int, height: int, color_type: int, rows: Iterable[bytes], level: int = 6
) -> bytes:
    """Return a PNG of 8-bit rows, each led by its filter byte; they are never all in memory."""
    from struct import pack
    from zlib import compressobj, crc32

    def chunk(kind: bytes, data: bytes) -> bytes:
        return pack(">I", len(data)) + kind + data + pack(">I", crc32(kind + data))

    header = pack(">IIBBBBB", width, height, 8, color_type, 0, 0, 0)
    packer = compressobj(level)
    data = b"".join(map(packer.compress, rows)) + packer.flush()
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", data), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


################################################################################
# Sizes
################################################################################
# From any spelling to the WIDTHxHEIGHT that is sent, and the rule that it must keep.


def size_fault(width: int, height: int) -> str:
    """Return the rule that a size breaks, or nothing. Source: the flexible rule in Facts."""
    if not width or not height:
        return "both sides must be more than 0"
    if width % SIDE_STEP or height % SIDE_STEP:
        return f"both sides must be multiples of {SIDE_STEP}"
    if max(width, height) > MAX_SIDE:
        return f"the longest side may be {MAX_SIDE}"
    if max(width, height) > MAX_RATIO * min(width, height):
        return f"the ratio may be {MAX_RATIO}:1 at most"
    if width * height < MIN_PIXELS:
        return f"it needs at least {MIN_PIXELS} pixels"
    if width * height > MAX_PIXELS:
        return f"it may have {MAX_PIXELS} pixels at most"
    return ""


def legal_sizes() -> list[tuple[int, int]]:
    """Return every legal size: about 29,000, so only where something is to be searched."""
    sides = range(SIDE_STEP, MAX_SIDE + 1, SIDE_STEP)
    return [(width, height) for width in sides for height in sides if not size_fault(width, height)]


def nearest_size(width: int, height: int) -> tuple[int, int]:
    """Return the legal size with least ln²(w/W) + ln²(h/H); on a tie the larger."""
    from math import log

    def distance(size: tuple[int, int]) -> tuple[float, int]:
        error = log(size[0] / max(width, 1)) ** 2 + log(size[1] / max(height, 1)) ** 2
        return round(error, 12), -size[0] * size[1]

    return min(legal_sizes(), key=distance)


def ratio_size(across: int, down: int, tier: int) -> tuple[int, int]:
    """Return the size of a ratio at a tier (0 to 2): the table's, else the computed one.

    Of the legal sizes within 1 % of the ratio the one of nearest area, else the nearest ratio.
    """
    from math import log

    for ratio, _, *sizes in SIZES:
        first, second = (int(side) for side in ratio.split(":"))
        if first * down == second * across:
            return sizes[tier]

    def stretch(size: tuple[int, int]) -> float:
        return abs(log(size[0] * down / (size[1] * across)))

    def area_gap(size: tuple[int, int]) -> float:
        return abs(log(size[0] * size[1] / TIER_PIXELS[tier]))

    legal = legal_sizes()
    close = [size for size in legal if stretch(size) <= log(1.01)]
    if close:
        return min(close, key=lambda size: (area_gap(size), stretch(size)))
    return min(legal, key=lambda size: (stretch(size), area_gap(size)))


def parse_size(spelling: str) -> tuple[int, int] | None:
    """Return (width, height) in pixels of a spelling, or None for auto; the rule isn't checked.

    Takes auto, WIDTHxHEIGHT, a tier, a ratio, a name, and RATIO@TIER or NAME@TIER.
    Raises ValueError, with a sentence, for anything else.
    """
    text = spelling.strip()
    exact = re.fullmatch(r"([0-9]{1,5})\s*[x×X*]\s*([0-9]{1,5})", text)
    if exact:
        return int(exact[1]), int(exact[2])
    shape, at, tier_name = text.partition("@")
    if not at and shape.upper() in TIERS:
        shape, tier_name = "square", shape
    tier = TIERS.index((tier_name or "1K").upper()) if (tier_name or "1K").upper() in TIERS else -1
    ratio = re.fullmatch(r"([0-9]{1,4}):([0-9]{1,4})", shape)
    names = {row[1]: row[2:] for row in SIZES}
    if text.lower() == "auto":
        return None
    tier = -1 if at and not tier_name else tier
    if tier >= 0 and ratio and int(ratio[1]) and int(ratio[2]):
        return ratio_size(int(ratio[1]), int(ratio[2]), tier)
    if tier >= 0 and shape.lower() in names:
        return names[shape.lower()][tier]
    known = [*names, *TIERS, *(row[0] for row in SIZES), "auto"]
    raise ValueError(
        f"size {spelling!r} is not auto, WIDTHxHEIGHT, 1K, 2K, 4K, a ratio like 16:9 or 16:9@4K, "
        f"or a name like story@2K{nearest(shape if tier >= 0 else text, known)}"
    )


def size_text(size: tuple[int, int] | None) -> str:
    """Return a size as the API spells it."""
    return f"{size[0]}x{size[1]}" if size else "auto"


################################################################################
# Settings
################################################################################
# Each setting: flag > config file (profile over top level) > environment > default, key by key.
# Reads the environment and the config file; runs api_key_command; sends nothing.

Layer = Tuple[str, Dict[str, Any]]  # a name to show, and its settings


def read_number(kind: str) -> Callable[[Any], int]:
    """Return the reader of a whole number in ASCII digits whose kind is `low..high`."""
    low, high = map(int, kind.split(".."))

    def read(value: Any) -> int:
        if isinstance(value, bool) or not re.fullmatch("[0-9]{1,9}", str(value)):
            raise ValueError(f"{value!r} is not a whole number from {low} to {high}")
        if not low <= int(value) <= high:
            raise ValueError(f"{value} is outside {low} to {high}")
        return int(value)

    return read


def read_truth(value: Any) -> bool:
    """Return a yes or no, as JSON or as an environment spells it."""
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if str(value).lower() not in known:
        raise ValueError(f"{value!r} is neither true nor false")
    return known[str(value).lower()]


def read_text(value: Any) -> str:
    """Return a text without control characters."""
    if not isinstance(value, str) or UNPRINTABLE.search(value):
        raise ValueError(f"{value!r} is not a text without control characters")
    return value.strip()


def read_secret(value: Any) -> str:
    """Return a key as it stands; a bad one is never shown."""
    if not isinstance(value, str):
        raise ValueError("it is not a text")
    return value


def read_name(value: Any) -> str:
    """Return the name of an environment variable; a key put here by mistake is not shown."""
    if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", str(value)):
        raise ValueError("it is not the name of an environment variable")
    return str(value)


def read_object(value: Any) -> dict[str, Any]:
    """Return a JSON object, which an environment variable holds as text."""
    if isinstance(value, str):
        value = json.loads(value)
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    return value


def read_prices(value: Any) -> dict[str, Any]:
    """Return own prices per million tokens: {"currency", "text_in", ..., "out"}, or by model."""
    prices = read_object(value)
    for row in (prices, *(row for row in prices.values() if isinstance(row, dict))):
        for name, amount in row.items():
            number = isinstance(amount, (int, float)) and not isinstance(amount, bool)
            if name != "currency" and not isinstance(amount, dict) and not (number and amount >= 0):
                raise ValueError(f"{printable(name)!r} is no price")
    return prices


def read_headers(value: Any) -> dict[str, str]:
    """Return extra request headers; names and values that could forge another are refused."""
    headers = read_object(value)
    for name, text in headers.items():
        if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", name) or not isinstance(text, str):
            raise ValueError(f"{printable(name)!r} is not a header name with a text")
        if re.search(r"[^\x20-\x7e]", text):
            raise ValueError(f"the value of header {name} holds characters that a header may not")
    return headers


def read_auth_header(value: Any) -> str:
    """Return `Name` or `Name: Scheme`, the header that carries the key."""
    text = read_text(value)
    if not re.fullmatch(r"[A-Za-z0-9-]+(: ?[A-Za-z0-9-]+)?", text):
        raise ValueError("it is neither a header name nor 'Name: Scheme'")
    return text


def read_command(value: Any) -> list[str]:
    """Return the words of a command, which is run without a shell."""
    from shlex import split

    windows = os.name == "nt"  # where a backslash is part of a path
    words = split(value, posix=not windows) if isinstance(value, str) else value
    words = [word.strip('"') for word in words] if windows and isinstance(value, str) else words
    if not isinstance(words, list) or not words or not all(isinstance(w, str) for w in words):
        raise ValueError("it is neither a command line nor a list of words")
    return words


def read_choice(*values: str) -> Callable[[Any], str]:
    """Return a reader that takes one word of a closed set."""

    def read(value: Any) -> str:
        if value not in values:
            close = nearest(str(value), values)
            raise ValueError(f"{value!r} is not one of {', '.join(values)}{close}")
        return str(value)

    return read


def quoted(text: str) -> str:
    """Return text as one word of a shell line."""
    from shlex import quote

    return quote(text)


def read_field(field: Field, value: Any) -> Any:
    """Return an API option's value, checked against its row; ValueError says why not."""
    if not field.kind:
        return read_truth(value)
    if ".." in field.kind:
        return read_number(field.kind)(value)
    text = read_text(value)
    if not text:
        raise ValueError("it is empty")
    if field.kind == "SIZE":
        parse_size(text)
    elif not field.kind.isupper():
        text = "jpeg" if field.name == "output_format" and text == "jpg" else text
        values = field.kind.split()
        if text not in values:
            past = f"--param {field.name}={quoted(text)} sends it unchecked"
            close = nearest(text, values)
            raise ValueError(f"{text!r} is not one of {', '.join(values)}{close} ({past})")
    return text


def read_as(name: str) -> Callable[[Any], Any]:
    """Return the reader of one field of the API."""
    field = next(field for field in FIELDS if field.name == name)
    return lambda value: read_field(field, value)


# Every setting: its reader and its default.
SETTINGS: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "base_url": (read_text, None),
    "provider": (read_choice(*PROVIDERS), None),
    "api_key": (read_secret, None),
    "api_key_env": (read_name, None),
    "api_key_command": (read_command, None),
    "model": (read_as("model"), DEFAULT_MODEL),
    "size": (read_as("size"), None),
    "quality": (read_as("quality"), None),
    "format": (read_as("output_format"), None),
    "output_dir": (read_text, "."),
    "timeout": (read_number("1..86400"), 600),
    "connect_timeout": (read_number("1..86400"), 20),
    "retries": (read_number("0..20"), 2),
    "allow_http": (read_truth, False),
    "headers": (read_headers, {}),
    "auth_header": (read_auth_header, None),
    "image_field": (read_choice("auto", "image", "image[]"), "auto"),
    "proxy": (read_text, None),
    "cacert": (read_text, None),
    "user_agent": (read_text, f"{PROGRAM}/{__version__}"),
    "prices": (read_prices, None),
    "history": (read_truth, True),
    "profile": (read_text, None),
    "profiles": (read_object, {}),
}
KEY_SETTINGS = ("api_key_command", "api_key_env", "api_key")  # the first that gives one
SECRET_NAMES = re.compile(r"auth|key|token|secret|cookie|password", re.I)


class Setting(NamedTuple):
    """One resolved setting: its value, where it came from, and which others it hides."""

    value: Any
    source: str
    hides: tuple[str, ...] = ()


class BaseUrl(NamedTuple):
    """A normal base URL: `origin` is scheme, host and port, which a key belongs to."""

    url: str
    scheme: str
    host: str
    port: int

    @property
    def origin(self) -> tuple[str, str, int]:
        """What must be equal for a key to go along."""
        return self.scheme, "localhost" if self.loopback else self.host, self.port

    @property
    def loopback(self) -> bool:
        """Whether the host is this machine, in any spelling."""
        return is_loopback(self.host)


class Settings(NamedTuple):
    """What the rest of the program needs of the settings; `table` is for config --show."""

    base: BaseUrl
    provider: Provider
    key: str | None
    key_source: str
    timeout: int
    connect_timeout: int
    retries: int
    headers: tuple[tuple[str, str], ...]
    auth_header: str
    image_field: str
    proxy: str | None
    cacert: str | None
    user_agent: str
    output_dir: str
    prices: dict[str, Any] | None
    history: bool
    table: dict[str, Setting]
    allow_private: bool = False
    sandbox: bool = False
    discount: float = 1.0  # what the Batch API leaves of a price


def is_loopback(host: str) -> bool:
    """Return whether a host name or address is this machine itself."""
    host = host.strip("[]").lower().rstrip(".")
    return bool(
        host == "localhost" or host == "::1" or re.fullmatch(r"127(\.[0-9]{1,3}){1,3}", host)
    )


def parse_base_url(text: str) -> BaseUrl:
    """Return the normal form of a base URL as a person types or pastes it; ValueError says why not.

    No scheme means https (http on loopback), a bare host gets /v1, a pasted endpoint is cut.
    """
    url = text.strip()
    if "@" in url.partition("://")[2].partition("/")[0] or re.match(r"[^/]*:[^/]*@", url):
        raise ValueError("it holds user:password@; use api_key or headers instead")
    if re.search(r"[^!-~]|[\"'{}<>\\^`|#?]", url):
        raise ValueError("it holds a character that a base URL may not")
    scheme, mark, rest = url.partition("://")
    if not mark:
        host_only = re.split(r"[:/]", url)[0] if not url.startswith("[") else url.split("]")[0]
        scheme, rest = ("http" if is_loopback(host_only) else "https"), url
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::([0-9]{1,5}))?(/.*)?", rest)
    if scheme.lower() not in ("http", "https") or not match:
        raise ValueError("it is not http(s)://HOST[:PORT][/PATH]")
    port = int(match[2] or (443 if scheme.lower() == "https" else 80))
    if not 0 < port < 65536:
        raise ValueError(f"{port} is no port")
    path = (match[3] or "").rstrip("/")
    if re.search(r"[\[\]]", path):
        raise ValueError("it holds a character that a base URL may not")
    path = re.sub(r"(/images(/(generations|edits))?|/models|/chat/completions)$", "", path)
    where = match[1].lower() + (f":{match[2]}" if match[2] else "")
    full = f"{scheme.lower()}://{where}{path.rstrip('/') or '/v1'}"
    return BaseUrl(full, scheme.lower(), match[1].lower().strip("[]"), port)


def find_provider(host: str) -> Provider:
    """Return the provider whose host this is, else generic."""
    for provider in PROVIDERS.values():
        for known in provider.hosts:
            if host == known or (known.startswith(".") and host.endswith(known)):
                return provider
    return PROVIDERS["generic"]


def config_places(env: dict[str, str]) -> list[str]:
    """Return where a config file may lie, the first that exists winning."""
    home = os.path.expanduser("~")
    xdg = env.get("XDG_CONFIG_HOME") or os.path.join(home, ".config")
    return [
        os.path.join(xdg, "gpt-image-2", "config.json"),
        os.path.join(home, ".config", "gpt-image-2", "config.json"),
        os.path.join(home, ".gpt-image-2-config.json"),
        os.path.join(home, ".hermes", "gpt-image-2-config.json"),
    ]


def read_config(path: str) -> dict[str, Any]:
    """Return a config file's object; Failure (exit 3) where it can't be read or is none."""
    try:
        with open(path, "rb") as file:
            value = json.loads(file.read(MEGABYTE).decode("utf-8-sig"))
    except OSError as error:
        raise config_failure(f"cannot read {printable(path)}: {os_reason(error)}") from None
    except (ValueError, RecursionError) as error:
        why = printable(str(error))
        raise config_failure(f"{printable(path)} is not valid JSON: {why}", "repair it") from None
    if not isinstance(value, dict):
        raise config_failure(f"{printable(path)} does not hold a JSON object", "see config --init")
    return value


def check_config(path: str, config: dict[str, Any], console: Console) -> None:
    """Warn of keys that nobody knows and of a file that others can read."""
    profiles = config.get("profiles")
    for part in (config, *(profiles.values() if isinstance(profiles, dict) else ())):
        for key in part if isinstance(part, dict) else ():
            if key not in SETTINGS:
                close = nearest(key, SETTINGS)
                console.warn(f"{printable(path)}: unknown setting {printable(key)!r}{close}")
    if os.name == "posix" and os.stat(path).st_mode & 0o077:
        console.warn(f"others can read {printable(path)}; run: chmod 600 {quoted(path)}")


def find_config(flag: str | None, env: dict[str, str]) -> str | None:
    """Return the config file in force: the one named, else the first that exists, else None."""
    named = flag or env.get("GPT_IMAGE2_CONFIG")
    if named:
        return os.path.abspath(os.path.expanduser(named))
    return next((path for path in config_places(env) if os.path.lexists(path)), None)


def file_layers(
    path: str | None, profile: str | None, spare: str | None, console: Console
) -> list[Layer]:
    """Return the chosen profile's settings and the config file's own, in that order.

    The flag names the profile, else the file, else (`spare`) the environment.
    """
    if not path:
        if profile or spare:
            raise config_failure(f"there is no config file to hold profile {profile or spare!r}")
        return []
    config = read_config(path)
    check_config(path, config, console)
    name = profile or config.get("profile") or spare
    if not name:
        return [(path, config)]
    profiles = config.get("profiles")
    known = profiles if isinstance(profiles, dict) else {}
    if not isinstance(name, str) or not isinstance(known.get(name), dict):
        close = nearest(str(name), known)
        has = ", ".join(known) or "none"
        raise config_failure(f"{path} has no profile {name!r}; it has: {printable(has)}{close}")
    return [(f"{path} (profile {name})", known[name]), (path, config)]


def setting_source(layer: str, key: str) -> str:
    """Return the name that `config --show` gives to the place of one setting."""
    if layer == "environment":
        return f"GPT_IMAGE2_{key.upper()}"
    return f"--{key.replace('_', '-')}" if layer == "flag" else layer


def resolve_setting(key: str, layers: Sequence[Layer]) -> Setting:
    """Return one setting from the first layer that has it, parsed; Failure names a bad value."""
    read, default = SETTINGS[key]
    holders = [(name, layer[key]) for name, layer in layers if layer.get(key) is not None]
    if not holders:
        return Setting(default, "default")
    name, raw = holders[0]
    try:
        value = read(raw)
    except ValueError as error:
        source = setting_source(name, key)
        exit_code = EXIT_USAGE if name == "flag" else EXIT_CONFIG
        raise Failure(f"{source}: {key}: {printable(str(error))}", exit_code) from None
    hides = tuple(setting_source(other, key) for other, _ in holders[1:])
    return Setting(value, setting_source(name, key), hides)


def resolve_base(table: dict[str, Setting], env: dict[str, str]) -> Setting:
    """Return the base URL in force as a BaseUrl, with its source."""
    setting = table["base_url"]
    if setting.value is None and env.get("OPENAI_BASE_URL"):
        setting = Setting(env["OPENAI_BASE_URL"], "OPENAI_BASE_URL")
    elif env.get("OPENAI_BASE_URL"):
        setting = setting._replace(hides=(*setting.hides, "OPENAI_BASE_URL"))
    if setting.value is None:
        provider = PROVIDERS.get(table["provider"].value or "openai")
        if not provider or not (provider.base_url or provider.name == "generic"):
            raise config_failure("provider azure needs a base_url", "see config --init")
        setting = Setting(provider.base_url or OPENAI_URL, f"provider {provider.name}")
    try:
        return setting._replace(value=parse_base_url(setting.value))
    except ValueError as error:
        shown = "" if "@" in setting.value else f" {setting.value!r}"
        message = f"{setting.source}: the base URL{shown} is not usable: {error}"
        typed_in = setting.source.startswith(("--", "GPT_IMAGE2_", "OPENAI_"))
        raise Failure(message, EXIT_USAGE if typed_in else EXIT_CONFIG) from None


def clean_key(raw: str, source: str) -> str:
    """Return a key without the dress it was pasted in; refuse what can't be one, without echo."""
    key = raw.strip().strip("\ufeff\"'").strip()
    key = key[7:].strip() if key[:7].lower() == "bearer " else key
    if not key:
        return ""
    if re.search(r"[^!-~]", key):
        why = "it holds spaces, control characters or non-ASCII characters"
        raise config_failure(f"the key from {source} is unusable: {why}", "paste it again")
    if PLACEHOLDER_KEY.fullmatch(key):
        raise config_failure(f"the key from {source} is a placeholder", "put in the real key")
    return key


def run_key_command(words: list[str], source: str) -> str:
    """Return what api_key_command prints; Failure where it fails."""
    import subprocess

    try:
        with SIGNALS:
            done = subprocess.run(
                words, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False
            )
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        why = os_reason(error) if isinstance(error, OSError) else type(error).__name__
        raise config_failure(f"api_key_command of {source} failed: {why}") from None
    if done.returncode or not done.stdout.strip():
        why = f"exit {done.returncode}" if done.returncode else "it printed nothing"
        raise config_failure(f"api_key_command of {source} failed: {why}")
    return done.stdout.decode("utf-8", "replace").strip().splitlines()[0]


def layer_key(name: str, layer: dict[str, Any], env: dict[str, str], console: Console) -> str:
    """Return the key that one layer gives: command, then variable, then the text itself."""
    for setting in KEY_SETTINGS:
        value = resolve_setting(setting, [(name, layer)]).value
        source = setting_source(name, setting)
        if setting == "api_key_command" and value:
            return clean_key(run_key_command(value, source), source)
        if setting == "api_key_env" and value:
            key = clean_key(env.get(value, ""), f"${value}")
            if key:
                return key
            console.warn(f"{source}: api_key_env names {value}, which is empty")
        elif value:
            return clean_key(value, source)
    return ""


def origin_of(url: str) -> tuple[str, str, int]:
    """Return the origin of a base URL; one that can't be read is equal to none."""
    try:
        return parse_base_url(url).origin
    except ValueError:
        return ("", "?", 0)


def layer_origin(index: int, layers: Sequence[Layer]) -> tuple[str, str, int]:
    """Return the origin that a file layer's keys belong to: its base URL's, or OpenAI's."""
    for _, layer in layers[index:]:
        provider = PROVIDERS.get(str(layer.get("provider")))
        url = layer.get("base_url") or (provider.base_url if provider else "")
        if url:
            return origin_of(str(url))
    return origin_of(OPENAI_URL)


def choose_key(
    base: BaseUrl, flag: str | None, files: list[Layer], env: dict[str, str], console: Console
) -> tuple[str | None, str]:
    """Return the key that may go to `base` and where it came from; (None, why not) without one.

    A file's key goes only to that file's base URL, OPENAI_API_KEY only to OPENAI_BASE_URL or
    OpenAI; a flag's and GPT_IMAGE2_API_KEY's go to whatever base URL is in force.
    """
    if flag is not None:
        key = clean_key(flag, "--api-key")
        if not key:
            raise Failure("--api-key is empty")
        return key, "--api-key"
    kept = ""
    for index, (name, layer) in enumerate(files):
        if not any(layer.get(setting) for setting in KEY_SETTINGS):
            continue
        if layer_origin(index, files) != base.origin:
            kept = kept or f"the key of {printable(name)} belongs to another host and is not sent"
            continue
        key = layer_key(name, layer, env, console)
        if key:
            return key, name
        kept = kept or f"{layer.get('api_key_env', 'api_key')} of {name} is empty"
    own = {key: env.get(f"GPT_IMAGE2_{key.upper()}") for key in KEY_SETTINGS}
    key = layer_key("environment", {k: v for k, v in own.items() if v}, env, console)
    if key:
        return key, "GPT_IMAGE2_API_KEY"
    pair = origin_of(env.get("OPENAI_BASE_URL") or OPENAI_URL)
    key = env.get("OPENAI_API_KEY", "").strip()
    if key and pair == base.origin:
        return clean_key(key, "$OPENAI_API_KEY"), "OPENAI_API_KEY"
    if key:
        kept = kept or f"OPENAI_API_KEY belongs to {pair[1]} and is not sent to {base.host}"
    return None, kept or "no API key is set"


def own_headers(
    setting: Setting, base: BaseUrl, files: list[Layer], console: Console
) -> dict[str, str]:
    """Return the extra headers, less a file's secret ones where the host is not that file's."""
    headers: dict[str, str] = setting.value
    for index, (name, layer) in enumerate(files):
        if layer.get("headers") is not None:
            if layer_origin(index, files) == base.origin:
                return headers
            secret = [header for header in headers if SECRET_NAMES.search(header)]
            if secret:
                console.warn(f"{', '.join(secret)} of {name} belong to another host; not sent")
            return {header: text for header, text in headers.items() if header not in secret}
    return headers


def resolve_settings(args: Args, console: Console) -> Settings:
    """Return the settings in force. Raises Failure: exit 3 for a bad file, 2 for a bad flag."""
    env = dict(os.environ)
    values = {key: getattr(args, key) for key in SETTINGS}
    flags = {key: value for key, value in values.items() if value is not None}
    found = {key: env.get(f"GPT_IMAGE2_{key.upper()}") for key in SETTINGS}
    environment = ("environment", {key: value for key, value in found.items() if value})
    path = find_config(args.config, env)
    spare = environment[1].get("profile")
    files = file_layers(path, args.profile, spare, console)
    layers = [("flag", flags), *files, environment]
    table = {key: resolve_setting(key, layers) for key in SETTINGS if key not in KEY_SETTINGS}
    table["base_url"] = resolve_base(table, env)
    base: BaseUrl = table["base_url"].value
    named = table["provider"].value
    provider = PROVIDERS[named] if named else find_provider(base.host)
    key, source = None, "the sandbox needs no key"
    if not args.sandbox:
        key, source = choose_key(base, args.api_key, files, env, console)
    for secret in (key, *secret_settings(table)):
        if secret:
            console.keep_secret(secret)
    if args.api_key:
        console.warn("--api-key can be seen in ps and in the shell's history; use api_key_env")
    return Settings(
        base,
        provider,
        key,
        source,
        headers=tuple(own_headers(table["headers"], base, files, console).items()),
        auth_header=table["auth_header"].value or provider.auth_header,
        table=table,
        sandbox=bool(args.sandbox),
        allow_private=bool(args.allow_private),
        **{name: table[name].value for name in PLAIN_SETTINGS.split()},
    )


PLAIN_SETTINGS = """timeout connect_timeout retries image_field proxy cacert user_agent output_dir
    prices history"""


def secret_settings(table: dict[str, Setting]) -> list[str]:
    """Return the secrets that settings other than the key hold: header values, proxy passwords."""
    headers = table["headers"].value.items()
    found = [text for name, text in headers if SECRET_NAMES.search(name)]
    proxy = re.search(r"//[^/@]*:([^/@]*)@", table["proxy"].value or "")
    return found + ([proxy[1]] if proxy else [])


def check_connection(settings: Settings) -> None:
    """Refuse to go on without a key, with one in clear text, or over http (exit 3 and 2)."""
    base = settings.base
    if settings.key is None and not (base.loopback or settings.sandbox):
        why = settings.key_source
        name = settings.provider.key_env
        hint = "set GPT_IMAGE2_API_KEY, or run config --init"
        if name == "OPENAI_API_KEY":
            hint = "set OPENAI_API_KEY or GPT_IMAGE2_API_KEY, or run config --init"
        if why.endswith(" is empty"):
            hint = f"export {why.partition(' ')[0]}=YOUR-KEY"
        raise Failure(f"{why} ({base.host})", EXIT_CONFIG, code="key_missing", hint=hint)
    if "your-resource" in base.host:
        raise config_failure(f"{base.host} is the template's", "put your resource into base_url")
    allow_http = settings.table["allow_http"].value
    secret = settings.key or any(SECRET_NAMES.search(name) for name, _ in settings.headers)
    if base.scheme == "http" and secret and not base.loopback and not allow_http:
        raise Failure(f"{base.url} would get the key in clear text; use https or --allow-http")
    for name in ("proxy", "cacert"):
        value = settings.table[name].value
        if name == "cacert" and value and not os.path.isfile(os.path.expanduser(value)):
            raise config_failure(f"cacert {printable(value)} is not a file")


################################################################################
# Requests
################################################################################
# From what was asked for to a checked Request. Reads the prompt and the input files; sends nothing.


class Ask(NamedTuple):
    """What one job asks for, before any rule is checked: from the command line or a batch line."""

    command: str  # generate or edit
    prompt: str
    options: dict[str, Any]  # by API name; a size as it was spelled
    params: tuple[tuple[str, Any], ...] = ()
    images: tuple[str, ...] = ()
    mask: str | None = None
    mask_box: tuple[int, int, int, int] | None = None
    markup: str | None = None
    nearest: bool = False


def read_param(text: str) -> tuple[str, Any]:
    """Return KEY=VALUE as (dotted API name, value); VALUE is JSON where it parses as JSON."""

    name, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+){0,20}", name):
        raise ValueError(f"{text!r} is not KEY=VALUE with a KEY like quality or svg.model")
    try:
        parsed = json.loads(value)
        json.dumps(parsed, allow_nan=False)  # NaN, Infinity and 1e400 are no JSON: text, then
        return name, parsed
    except (ValueError, RecursionError):
        return name, value


def read_mask_box(text: str) -> tuple[int, int, int, int]:
    """Return X,Y,WIDTH,HEIGHT in pixels of the first image."""
    match = re.fullmatch(r"([0-9]{1,5}),([0-9]{1,5}),([0-9]{1,5}),([0-9]{1,5})", text)
    if not match or not int(match[3]) or not int(match[4]):
        raise ValueError(f"{text!r} is not X,Y,WIDTH,HEIGHT in pixels")
    return int(match[1]), int(match[2]), int(match[3]), int(match[4])


def read_prompt_file(path: str) -> str:
    """Return the prompt in a file, or in standard input for `-`, less a BOM and one newline."""
    name = "standard input" if path == "-" else path
    try:
        if path == "-":
            with SIGNALS:
                data = sys.stdin.buffer.read(MEGABYTE + 1)
        else:
            with open(path, "rb") as file:
                data = file.read(MEGABYTE + 1)
        if len(data) > MEGABYTE:
            raise Failure(f"the prompt in {name} is longer than {MEGABYTE} bytes")
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Failure(f"the prompt in {name} is not UTF-8") from None
    except (OSError, ValueError, AttributeError) as error:  # a closed stdin is None, or an object
        why = os_reason(error) if isinstance(error, OSError) else "it is closed"
        raise Failure(f"cannot read the prompt in {name}: {why}") from None
    return re.sub(r"\r?\n\Z", "", text)


def read_prompt(args: Args) -> tuple[str, list[str]]:
    """Return the prompt, from exactly one of its places, and the positional words left over."""
    words = list(args.words)
    given = [value for value in (args.prompt, args.prompt_file) if value is not None]
    if len(given) > 1:
        raise Failure("--prompt and --prompt-file are both given; pass one of them")
    if args.prompt is not None:
        return argument_text(args.prompt), words
    if args.prompt_file is not None:
        return read_prompt_file(args.prompt_file), words
    if not words:
        raise Failure("there is no prompt", hint="pass it as the last argument, in quotes")
    prompt = words.pop()
    return (read_prompt_file("-") if prompt == "-" else argument_text(prompt)), words


def argument_text(word: str) -> str:
    """Return an argument as the UTF-8 text that it is, in a locale that knows only ASCII too."""
    return os.fsencode(word).decode("utf-8", "surrogateescape")


def check_prompt(prompt: str, strict: bool, console: Console) -> None:
    """Refuse a prompt that is blank, holds NUL or isn't text; over-long is OpenAI's rule."""
    if not prompt.strip():
        raise Failure("the prompt is empty")
    if "\0" in prompt:
        raise Failure("the prompt holds a NUL character")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise Failure("the prompt is not UTF-8 text")
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        apply_rule(
            f"the prompt has {len(prompt)} characters, over {MAX_PROMPT_CHARACTERS}",
            "strict",
            strict,
            console,
        )


def apply_rule(sentence: str, level: str, strict: bool, console: Console) -> None:
    """Refuse or warn: `refuse` everywhere, `strict` is certain at OpenAI only, else `warn`."""
    if level == "refuse" or (level == "strict" and strict):
        raise Failure(sentence)
    console.warn(sentence)


def ask_from_args(args: Args, settings: Settings) -> Ask:
    """Return what the command line asks for, the settings filling what it leaves open."""
    prompt, words = read_prompt(args)
    images = (*words, *(args.image or ())) if args.command == "edit" else ()
    if args.command == "generate" and words:
        raise Failure(
            f"one prompt, please: {len(words) + 1} were given, {words[0]!r} first",
            hint="put it in quotes; to work on pictures use edit",
        )
    return Ask(
        args.command,
        prompt,
        {**chosen_options(args, settings), **suffix_option(args, args.output)},
        tuple(args.param or ()),
        images,
        args.mask,
        args.mask_box,
        args.markup,
        args.nearest_size,
    )


def suffix_option(args: Args, output: str | None) -> dict[str, str]:
    """Return the format that an output's suffix asks for: as a flag, it beats the config."""
    suffix = os.path.splitext(output or "")[1].lstrip(".").lower()
    known = suffix in SUFFIX_FORMATS and not args.format
    return {"output_format": SUFFIX_FORMATS[suffix]} if known else {}


def chosen_options(args: Args, settings: Settings) -> dict[str, Any]:
    """Return the API's options by name: flags, then settings."""
    options = {field.name: getattr(args, field.dest) for field in FIELDS}
    for field in FIELDS:
        setting = settings.table.get("format" if field.name == "output_format" else field.name)
        if setting and setting.value is not None:
            options[field.name] = setting.value
    return {name: value for name, value in options.items() if value is not None}


def build_request(ask: Ask, settings: Settings, console: Console) -> Request:
    """Return the checked request for one job. Raises Failure (exit 2) for what can't be right."""
    strict = settings.provider.strict
    check_prompt(ask.prompt, strict, console)
    options = {"model": DEFAULT_MODEL, **ask.options}
    overridden = {name for name, _ in ask.params}
    model = MODELS.get(options["model"])
    if options.get("partial_images") is not None:
        options.setdefault("stream", True)
    if ask.command == "edit" and "size" not in options:
        options["size"] = "auto"  # the documented defaults of this endpoint disagree
    if "size" in options and "size" not in overridden:
        options["size"] = check_size(options["size"], model, settings, ask.nearest, console)
    files = read_attachments(ask, strict, console) if ask.command == "edit" else ()
    checked = {name: value for name, value in options.items() if name not in overridden}
    for applies, level, sentence in field_rules(checked, ask, model, settings.provider.name):
        if applies:
            apply_rule(sentence, level, strict, console)
    if ask.command == "edit" and settings.provider.name == "nodekey":
        console.warn("NodeKey documents generations only")
    if "model" not in overridden:
        check_model(options["model"], settings.provider, console)
    ordered = {"model": options.pop("model"), "prompt": ask.prompt, **options}
    fields = overlay_params(ordered, ask.params)
    request = Request(ask.command, ENDPOINTS[ask.command], tuple(fields.items()), files)
    try:
        json_body(request).encode("utf-8")
    except UnicodeEncodeError:
        raise Failure("a value is not UTF-8 text") from None
    return request


def check_model(name: str, provider: Provider, console: Console) -> None:
    """Warn of a model that the table doesn't know, or that is near or past its last day."""
    model = MODELS.get(name)
    if model is None:
        if provider.name != "azure":  # there it is the deployment's name
            close = nearest(name, MODELS)
            console.warn(f"model {name} is not in the table of this version; sent as it is{close}")
    elif model.ends:
        days = (time.mktime(time.strptime(model.ends, "%Y-%m-%d")) - time.time()) / 86400
        if days < 60:
            when = "shuts down" if days > 0 else "was shut down"
            console.warn(f"OpenAI: {name} {when} on {model.ends}; use {DEFAULT_MODEL}")


def check_size(
    spelling: str, model: Model | None, settings: Settings, take_nearest: bool, console: Console
) -> str:
    """Return the size to send; Failure names the rule it breaks and the nearest legal size."""
    try:
        size = parse_size(spelling)
    except ValueError as error:
        raise Failure(str(error)) from None
    if size is None:
        return "auto"
    text = size_text(size)
    if model and model.sizes:
        if text not in model.sizes:
            sizes = ", ".join(model.sizes)
            sentence = f"size {text} is not one of this model's: {sizes}"
            apply_rule(sentence, "strict", settings.provider.name == model.owner, console)
        return text
    fault = size_fault(*size)
    if not fault:
        if size[0] * size[1] > 2560 * 1440:
            console.say(f"size {text} is above 2560x1440, which the guide calls experimental")
        return text
    legal = size_text(nearest_size(*size))
    if take_nearest:
        console.say(f"size {text}: {fault}; taking {legal}")
        return legal
    sentence = f"size {text}: {fault}; the nearest legal size is {legal} (--nearest-size takes it)"
    apply_rule(sentence, "refuse" if model else "warn", False, console)
    return text


def field_rules(
    options: dict[str, Any], ask: Ask, model: Model | None, provider: str
) -> Iterator[tuple[bool, str, str]]:
    """Yield every rule between fields as (does it bite, level, sentence). Source: SDK, guide."""
    family = model.family if model else ""
    format_ = options.get("output_format", "png")
    edit = ask.command == "edit"
    transparent = options.get("background") == "transparent"
    svg_names = [name for name in options if name.startswith("svg.")]
    frames = "frame_count" in options or "frame_duration_ms" in options
    moving = format_ in ("gif", "svg")
    yield transparent and format_ == "jpeg", "refuse", "jpeg can't be transparent; use png or webp"
    yield transparent and moving, "strict", f"{format_} can't be transparent; use png or webp"
    yield (
        transparent and family == "2",
        "warn",
        "transparent is a preview on gpt-image-2; relays may refuse it",
    )
    yield (
        "output_compression" in options and format_ not in ("jpeg", "webp"),
        "strict",
        f"--compression is for jpeg and webp, not {format_}",
    )
    yield moving and bool(options.get("stream")), "strict", f"{format_} can't be streamed"
    yield frames and format_ != "gif", "strict", "--frame-count and its like need --format gif"
    yield bool(svg_names) and format_ != "svg", "strict", "--svg-model and its like need -f svg"
    yield format_ == "svg" and options.get("n", 1) > 1, "strict", "svg: only one at a time (--n 1)"
    yield format_ == "gif" and bool(ask.mask or ask.mask_box), "strict", "gif takes no mask"
    yield (
        options.get("quality") in ("xhigh", "max") and family not in ("2.5", "2.6", ""),
        "warn",
        "quality xhigh and max are known on the 2.5 and 2.6 models only",
    )
    yield "complexity" in options and family not in ("2.6", ""), "warn", "complexity is for 2.6"
    yield bool(ask.markup) and family not in ("2.5", "2.6", ""), "warn", "markup is for 2.5 and 2.6"
    yield edit and "moderation" in options, "warn", "edits may not take moderation"
    yield (
        "response_format" in options and (edit or provider not in ("openai-hk", "nodekey")),
        "warn" if edit else "strict",
        "edits may not take response_format" if edit else "OpenAI refuses response_format",
    )
    yield (
        "input_fidelity" in options and family in ("2", "2.5", "2.6"),
        "strict",
        "gpt-image-2 and later refuse input_fidelity",
    )
    yield (
        options.get("input_fidelity") == "high" and family == "1-mini",
        "strict",
        "gpt-image-1-mini takes input_fidelity low only",
    )


def overlay_params(fields: dict[str, Any], params: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return the fields with --param laid over them; a parent takes the place of its children."""
    for name, value in params:
        for known in [key for key in fields if key.startswith(f"{name}.")]:
            del fields[known]
        if any(name.startswith(f"{key}.") for key in fields):
            raise Failure(f"--param {name}: a field above it is set already")
        fields[name] = value
    return fields


def read_attachments(ask: Ask, strict: bool, console: Console) -> tuple[Attachment, ...]:
    """Return the checked input files of an edit: images, then mask or markup."""
    if not ask.images:
        raise Failure("edit needs an image", hint='edit IMAGE... "PROMPT"')
    if len(ask.images) > MAX_INPUT_IMAGES:
        sentence = f"{len(ask.images)} images are over the limit of {MAX_INPUT_IMAGES}"
        apply_rule(sentence, "strict", strict, console)
    overlays = [name for name in ("mask", "mask_box", "markup") if getattr(ask, name)]
    if len(overlays) > 1:
        names = " and ".join("--" + name.replace("_", "-") for name in overlays)
        raise Failure(f"{names} can't go together")
    files = [read_attachment("image", path) for path in ask.images]
    for image in files:
        kind, told = image.info.format, f"image {image.path}"
        if kind not in ("png", "jpeg", "webp"):
            sentence = f"{told} is {kind}; the API takes png, jpeg and webp"
            apply_rule(sentence, "strict", strict, console)
        if image.size >= MAX_INPUT_BYTES:
            sentence = f"{told} has {image.size} bytes; the API's limit is 50 MB"
            apply_rule(sentence, "strict", strict, console)
    first = files[0].info
    if ask.mask_box:
        files.append(box_mask(ask.mask_box, first))
    for field, path in (("mask", ask.mask), ("markup", ask.markup)):
        if path:
            files.append(read_attachment(field, path))
            check_overlay(files[-1], first, strict, console)
    return tuple(files)


def read_attachment(field: str, path: str) -> Attachment:
    """Return one input file by its bytes' own word; Failure names what is wrong with it."""
    from hashlib import sha256

    check_path(path)
    if not os.path.isfile(path):
        why = "is a folder" if os.path.isdir(path) else "does not exist or is no regular file"
        raise Failure(f"{field} {path} {why}")
    try:
        with open(path, "rb") as file:
            info = inspect_picture(file)
            size = file.seek(0, os.SEEK_END)
            digest = sha256()
            file.seek(0)
            for piece in iter(lambda: file.read(WINDOW), b""):
                digest.update(piece)
    except OSError as error:
        raise Failure(f"cannot read {field} {path}: {os_reason(error)}") from None
    if not info:
        raise Failure(f"{field} {path} is {'empty' if not size else 'not a picture'}")
    return Attachment(field, os.path.abspath(path), info, size, digest.hexdigest())


def check_overlay(overlay: Attachment, first: PictureInfo, strict: bool, console: Console) -> None:
    """Check a mask or markup: a PNG with alpha, of the first image's size."""
    name, info = f"{overlay.field} {overlay.path}", overlay.info
    if info.format != "png" or not info.alpha:
        sentence = f"{name} is {info.format} without alpha; it must be a PNG with transparency"
        if info.format == "png":
            sentence = f"{name} has no alpha channel; transparent is where the edit goes"
        apply_rule(sentence, "strict", strict, console)
    if (info.width, info.height) != (first.width, first.height):
        sizes = f"{info.width}x{info.height}, the first image {first.width}x{first.height}"
        apply_rule(f"{name} is {sizes}; they must be equal", "strict", strict, console)
    if overlay.field == "mask" and overlay.size > MASK_WARN_BYTES:
        console.warn(f"{name} has {overlay.size} bytes; OpenAI's types say below 4 MB")


def box_mask(box: tuple[int, int, int, int], first: PictureInfo) -> Attachment:
    """Return the mask that --mask-box draws for the first image."""
    from hashlib import sha256

    x, y, width, height = box
    if x + width > first.width or y + height > first.height:
        size = f"{first.width}x{first.height}"
        raise Failure(f"--mask-box {x},{y},{width},{height} leaves the first image ({size})")
    data = draw_mask(first.width, first.height, box)
    info = PictureInfo("png", first.width, first.height, True, True)
    return Attachment("mask", "", info, len(data), sha256(data).hexdigest(), data)


def payload(request: Request) -> dict[str, Any]:
    """Return the request's fields as the API nests them in JSON."""
    nested: dict[str, Any] = {}
    for name, value in request.fields:
        *parents, last = name.split(".")
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return nested


def json_body(request: Request) -> str:
    """Return the body of a JSON request."""
    return json.dumps(payload(request), ensure_ascii=False)


def form_fields(request: Request) -> list[tuple[str, str]]:
    """Return the request's fields as multipart spells them: svg[model], list[], true, 2."""

    def flatten(name: str, value: Any) -> Iterator[tuple[str, str]]:
        if isinstance(value, dict):
            for key, inner in value.items():
                if not re.fullmatch(r"[A-Za-z0-9_.-]+", key):
                    raise Failure(f"--param {name}: {key!a} can't name a form field")
                yield from flatten(f"{name}[{key}]", inner)
        elif isinstance(value, list):
            for inner in value:
                yield from flatten(f"{name}[]", inner)
        else:
            yield name, value if isinstance(value, str) else json.dumps(value)

    return [pair for name, value in payload(request).items() for pair in flatten(name, value)]


def request_hash(request: Request) -> str:
    """Return what makes two requests the same: endpoint, fields, and the input files' bytes."""
    files = [(file.field, file.sha256) for file in request.files]
    text = json.dumps([request.endpoint, sorted(request.fields), files], sort_keys=True)
    return light_sha256(text.encode("utf-8", "surrogatepass"))


def light_sha256(data: bytes) -> str:
    """Return the SHA-256 of a short text; to load OpenSSL for it takes 3 ms and 3.5 MB."""
    try:  # Python's own; not tried by turns, as a name that is not there is looked for each time
        module = __import__("_sha2" if sys.version_info >= (3, 12) else "_sha256")
    except ImportError:
        module = __import__("hashlib")
    return str(module.sha256(data).hexdigest())


################################################################################
# Planned paths
################################################################################
# Where the pictures will go, decided and tried before anything is spent.


def check_path(path: str) -> None:
    """Refuse a path that could not be shown as it is, or that curl's config could not hold."""
    if UNPRINTABLE.search(path):
        raise Failure(f"{path!a} holds control characters", hint="rename it")


def plan_target(
    output: str | None, output_dir: str | None, request: Request, settings: Settings, force: bool
) -> Target:
    """Return where the pictures of a request go. Touches nothing."""
    day, mark = time.strftime("%Y-%m-%d"), "-sandbox" if settings.sandbox else ""
    stems = tuple(f"{day}-{os.urandom(4).hex()}{mark}" for _ in range(request.total))
    folder = os.path.expanduser(settings.output_dir)
    if output == "-":
        if request.total > 1:
            raise Failure("-o - takes one picture; leave out --n")
        return Target(os.getcwd(), "", stems, 1, False, True)
    if output is not None:
        if not output.strip():
            raise Failure("-o is empty; it takes a file name, a folder or -")
        base = output_dir and os.path.expanduser(output_dir)
        full = os.path.abspath(os.path.join(base, output) if base else output)
        ends_open = output.endswith(("/", os.sep)) or os.path.basename(output) in (".", "..")
        if ends_open or os.path.isdir(full):
            return Target(full, "", stems, request.total)
        return Target(os.path.dirname(full), os.path.basename(full), stems, request.total, force)
    return Target(os.path.abspath(folder), "", stems, request.total)


def check_target(target: Target, sidecar: bool = False) -> None:
    """Refuse, before anything is sent, an output that exists or can't be written."""
    if target.stdout:
        return
    names = [target.path(index, "png") for index in range(target.planned)]
    for name in names + [f"{name}.json" for name in names if sidecar]:
        check_path(name)
        if len(os.path.basename(name).encode("utf-8", "surrogateescape")) > 240:
            raise Failure(f"the file name {os.path.basename(name)[:60]}… is too long")
        try:
            os.lstat(name)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise Failure(f"cannot use {name[:80]}: {os_reason(error)}") from None
        if not target.force:
            raise Failure(f"{name} exists; pass --force to replace it")
        if os.path.exists(name) and not os.path.isfile(name):
            raise Failure(f"{name} exists and is no regular file")
    check_folder(target.folder)


def check_folder(folder: str) -> None:
    """Try whether a folder, or the nearest one above it that exists, can be written."""
    place = folder
    while not os.path.lexists(place) and os.path.dirname(place) != place:
        place = os.path.dirname(place)
    try:
        unnamed_file(place).close()
    except OSError as error:
        raise Failure(f"cannot write in {place}: {os_reason(error)}") from None


def unnamed_file(folder: str) -> IO[bytes]:
    """Open a file without a name: nothing is left of it, even by SIGKILL.

    By hand on Linux, as the import of tempfile takes 6 ms of each start.
    """
    try:
        return open(os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600), "w+b")
    except (AttributeError, OSError):  # another system, or a file system that can't
        import tempfile

        return tempfile.TemporaryFile(dir=folder)


class Keeper:
    """Keeps the pace and the books of the jobs: here for one call, a batch has its own."""

    patience: float = MAX_WAIT_SECONDS  # a longer Retry-After is not waited for
    detached = False  # whether curl goes on without us after a signal, for a later call to take up
    again = "--new sends another"  # the way on from an outcome that stays unknown
    mark: dict[str, Any] | None = None  # what job.json says of the batch

    def enter(self) -> None:
        """Hold a POST back while it must not leave."""

    def sending(self, job: Job) -> None:
        """Hear that a POST leaves now."""

    def pause(self, seconds: float) -> None:
        """Wait as a server asked."""
        SIGNALS.pause(seconds)

    def done(self, job: Job, outcome: Outcome) -> None:
        """Hear what came of a job, before its folder may go."""


class Session(NamedTuple):
    """What one call of the program carries along: its terminal and its wishes."""

    console: Console
    new: bool = False
    retry_unsafe: bool = False
    digest: bool = False  # compute each picture's sha256
    sidecar: bool = False
    preview: bool = False
    mode: int = 0o644  # what the umask leaves of 0666; read once, as threads race on it
    keeper: Keeper = Keeper()
    root: str = ""  # the folder for jobs, if it was tried before
    part: str = ""  # in the names of unfinished files, so that a batch knows its own


class Task(NamedTuple):
    """One request on its way: what is sent, where its pictures go, and how."""

    request: Request
    target: Target
    settings: Settings
    session: Session

    @property
    def console(self) -> Console:
        """Where its messages go."""
        return self.session.console


################################################################################
# Job folders
################################################################################
# What the server sends is on disk before it is looked at: jobs/<UTC>-<hex>/ holds the request, the
# answer that curl writes, and the locks that tell who is still alive.

HISTORY = "history.jsonl"
RECORD, LOCK, ANSWER = "job.json", "lock", "response.json"
HEADERS, CURL_LINE = "headers.txt", "curl.txt"
RECOVERING = "recovering"  # in job.json, while a recover holds the job
# curl empties its headers' file before it connects, so one that still holds this was not touched:
# nothing was sent (tried with 7.88; in its source, from 7.58 to 8.20, the same).
UNTOUCHED = b"\n"
JOB_ID = re.compile(r"[0-9]{8}T[0-9]{6}Z-[0-9a-f]{12}")


def job_stamp(seconds: float) -> str:
    """Return the time that a job's name begins with."""
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(seconds))


class Job(NamedTuple):
    """One job folder that this process holds."""

    folder: str
    lock: IO[bytes]
    resumed: bool = False
    answer: str = ANSWER  # the file with the answer's body; an absolute one may be shared

    @property
    def id(self) -> str:
        """The folder's name: UTC time, then 8 hex of the request's hash and 4 random ones."""
        return os.path.basename(self.folder)

    def path(self, name: str) -> str:
        """Return the path of one of the job's files."""
        return os.path.join(self.folder, name)

    def answer_size(self, name: str = ANSWER) -> int:
        """Return how many bytes of the answer's body (or of its headers) have come."""
        return file_size(self.path(name))

    @property
    def answered(self) -> bool:
        """Whether anything of an answer has come."""
        return bool(self.answer_size()) or self.answer_size(HEADERS) > len(UNTOUCHED)

    @property
    def untouched(self) -> bool:
        """Whether curl never came as far as connecting."""
        return not self.answer_size() and self.answer_size(HEADERS) == len(UNTOUCHED)


def file_size(path: str) -> int:
    """Return a file's size in bytes, 0 for one that is not there."""
    try:
        return os.path.getsize(path)
    except OSError:
        return 0


def private_file(path: str, data: bytes = b"") -> None:
    """Write a new file that only its owner can read; an existing name is an OSError."""
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(path, flags, 0o600), "wb") as file:
        file.write(data)


def remove_file(path: str) -> None:
    """Remove a file that may not be there."""
    try:
        os.unlink(path)
    except OSError:
        pass


def try_lock(path: str) -> IO[bytes] | None:
    """Return the open, locked file, or None while another process holds it.

    The lock dies with its last holder, so it tells who lives without process ids.
    """
    try:
        import fcntl
    except ImportError:  # Windows: a file that any process holds open can't be renamed
        try:
            os.replace(path, f"{path}.free")
            os.replace(f"{path}.free", path)
        except FileNotFoundError:
            pass  # nobody has made it yet, or somebody was killed between the two
        except OSError:
            return None
        return open(path, "ab")
    file = open(path, "ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError:  # a file system without locks
        pass
    return file


def state_root() -> str:
    """Return the state folder as the XDG specification places it."""
    default = os.path.join(os.path.expanduser("~"), ".local", "state")
    return os.path.join(os.environ.get("XDG_STATE_HOME") or default, "gpt-image-2")


def spare_root() -> str:
    """Return the state folder of those who have no home that can be written."""
    user = str(os.getuid()) if hasattr(os, "getuid") else "user"
    folder = os.environ.get("TMPDIR") or os.path.join(os.sep, "tmp")
    if not os.path.isdir(folder):
        from tempfile import gettempdir

        folder = gettempdir()
    return os.path.join(folder, f"gpt-image-2-{user}")


def not_ours(info: os.stat_result) -> bool:
    """Return whether a folder is another user's or open to others, where there are users."""
    if not hasattr(os, "getuid"):
        return False
    return info.st_uid != os.getuid() or bool(info.st_mode & 0o077) or not S_ISDIR(info.st_mode)


def usable_root(root: str, private: bool) -> int:
    """Return how many bytes of answers fit below `root`, made where it is missing; 0 for none."""
    try:
        os.makedirs(root, 0o700, exist_ok=True)  # the mode is for the last folder only
        os.makedirs(os.path.join(root, "jobs"), 0o700, exist_ok=True)
        info = os.lstat(root)
        if private and not_ours(info):
            return 0
        with unnamed_file(os.path.join(root, "jobs")) as file:
            file.write(b"room for the request")
        return free_bytes(root)
    except OSError:
        return 0


def free_bytes(folder: str) -> int:
    """Return how much a file system still takes."""
    try:
        found = os.statvfs(folder)
    except AttributeError:  # Windows
        from shutil import disk_usage

        return disk_usage(folder).free
    return found.f_bavail * found.f_frsize


def jobs_folder(console: Console, pictures: int = 0) -> str:
    """Return the folder for new jobs, the spare one where the usual has no room for an answer.

    Raises Failure (exit 3) where nothing can be written at all.
    """
    root, spare, wanted = state_root(), spare_root(), max(1, pictures * ANSWER_BYTES)
    room = usable_root(root, False)
    if room >= wanted:
        return os.path.join(root, "jobs")
    spare_room = usable_root(spare, True)
    if not room and not spare_room:
        raise config_failure(f"cannot keep jobs in {root} or {spare}", "set XDG_STATE_HOME")
    if spare_room <= room:
        console.warn(f"{root} has only {room // MEGABYTE} MB free; the answer may not fit")
        return os.path.join(root, "jobs")
    why = f"{root} has only {room // 1024} KB free" if room else f"cannot write in {root}"
    console.warn(f"{why}; jobs are kept in {spare}")
    return os.path.join(spare, "jobs")


def job_folders(strict: bool = False) -> list[str]:
    """Return every job folder, oldest first, those without a record too.

    With `strict` a state folder that can't be read is a Failure: there may be answers in it.
    """
    found = []
    for root in (state_root(), spare_root()):
        folder = os.path.join(root, "jobs")
        try:
            if root == spare_root() and not_ours(os.lstat(root)):
                continue
            names = os.listdir(folder)
        except OSError as error:
            if strict and root == state_root() and not isinstance(error, FileNotFoundError):
                hint = "make it yours, or set XDG_STATE_HOME"
                raise config_failure(f"cannot read {folder}: {os_reason(error)}", hint) from None
            continue
        found += [os.path.join(folder, name) for name in names if JOB_ID.fullmatch(name)]
    # Names tell to the second when a job was made, its lock tells more.
    return sorted(
        found, key=lambda job: (os.path.basename(job)[:16], changed_at(os.path.join(job, LOCK)))
    )


def list_jobs(strict: bool = False) -> list[str]:
    """Return every job, oldest first; a folder without a record is none (yet, or any more)."""
    return [path for path in job_folders(strict) if os.path.exists(os.path.join(path, RECORD))]


def changed_at(path: str) -> int:
    """Return when a file was last written, in nanoseconds; 0 for one that is not there."""
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0


def write_record(folder: str, record: dict[str, Any]) -> None:
    """Write job.json, whole or not at all."""
    temporary = os.path.join(folder, f".{RECORD}.{os.urandom(4).hex()}")
    private_file(temporary, json.dumps(record, indent=1).encode("ascii"))
    os.replace(temporary, os.path.join(folder, RECORD))


def read_record(folder: str) -> dict[str, Any] | None:
    """Return job.json's object, or None where it can't be read or is not as we write it."""
    try:
        with open(os.path.join(folder, RECORD), "rb") as file:
            record = json.loads(file.read(8 * MEGABYTE))
        pairs = [(name, value) for name, value in record["fields"] if isinstance(name, str)]
        texts = [record[name] for name in ("command", "endpoint", "hash", "base_url")]
        read_target(record)
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None
    sound = all(isinstance(text, str) for text in texts) and len(pairs) == len(record["fields"])
    return record if sound else None


def read_target(record: dict[str, Any]) -> Target:
    """Return a job's target. Raises KeyError, TypeError or ValueError for one that is none."""
    target = Target(**record["target"])
    texts = (target.folder, target.name, *target.stems)
    if not target.stems or not all(isinstance(text, str) for text in texts):
        raise ValueError("not a target")
    return target._replace(stems=tuple(target.stems), planned=int(target.planned))


def job_record(task: Task) -> dict[str, Any]:
    """Return what job.json holds: enough to finish the job without its script; never the key."""
    request, settings = task.request, task.settings
    return {
        "schema": 1,
        "command": request.command,
        "endpoint": request.endpoint,
        "fields": [list(pair) for pair in request.fields],
        "files": [[file.field, file.path, file.sha256] for file in request.files],
        "hash": request_hash(request),
        "base_url": settings.base.url,
        "provider": settings.provider.name,
        "target": task.target._asdict(),
        "started": time.time(),
        "pid": os.getpid(),
        "status": "sending",
        "sandbox": settings.sandbox,
        "batch": task.session.keeper.mark,
    }


def create_job(task: Task) -> Job:
    """Make the job folder with everything that curl will read. Raises Failure (nothing sent)."""
    root = task.session.root or open_jobs_folder(task.console, task.request.total)
    record = job_record(task)
    folder = new_job_folder(root, record["hash"])
    try:
        private_file(os.path.join(folder, LOCK))
        lock = try_lock(os.path.join(folder, LOCK))
        assert lock, "a new lock is free"
        job = Job(folder, lock)
        write_body(job, task.request)
        for name in (ANSWER, CURL_LINE):
            private_file(job.path(name))  # curl would make them 0644
        private_file(job.path(HEADERS), UNTOUCHED)
        write_record(folder, record)
    except OSError as error:
        remove_folder(folder)
        raise Failure(f"cannot keep the job in {folder}: {os_reason(error)}") from None
    return job


def new_job_folder(root: str, request_hash: str) -> str:
    """Make and return a folder of a name that no job has, though many be made in this second."""
    while True:
        name = f"{job_stamp(time.time())}-{request_hash[:8]}{os.urandom(2).hex()}"
        folder = os.path.join(root, name)
        try:
            os.mkdir(folder, 0o700)
            return folder
        except FileExistsError:  # the same request, and the same 16 bits
            continue
        except OSError as error:
            raise Failure(f"cannot keep the job in {folder}: {os_reason(error)}") from None


def open_jobs_folder(console: Console, pictures: int) -> str:
    """Return the folder for new jobs, with room for so many pictures, swept of what is too old."""
    root = jobs_folder(console, pictures)
    sweep_jobs()
    return root


def write_body(job: Job, request: Request) -> None:
    """Write what is sent: the JSON body, or the prompt and a drawn mask for multipart."""
    if request.endpoint == "generations":
        private_file(job.path("body.json"), json_body(request).encode("utf-8"))
        return
    for index, (name, text) in enumerate(form_fields(request)):
        if goes_by_file(name, text):
            private_file(job.path(f"field-{index}.txt"), text.encode("utf-8"))
    for file in request.files:
        if file.data:
            private_file(job.path("mask.png"), file.data)


def goes_by_file(name: str, text: str) -> bool:
    """Return whether a form value goes by file: the prompt, and what a config line can't hold."""
    return name == "prompt" or len(text) > 1000 or bool(re.search("[\x00-\x1f\x7f]", text))


def same_jobs(task: Task) -> Iterator[Job]:
    """Yield, held, every unfinished job of the same request and target whose script is dead."""
    wanted, target, base_url = request_hash(task.request), task.target, task.settings.base.url
    for folder in list_jobs():
        record = read_record(folder) if folder[-12:-4] == wanted[:8] else None
        if not record or record["hash"] != wanted:
            continue
        theirs = read_target(record)
        if theirs[:2] != target[:2] or theirs.stdout != target.stdout:
            continue
        passed_over = record.get("status") == "set aside" or record.get("batch")
        if record["base_url"] == base_url and not passed_over:
            job = take_job(folder)
            if job:
                yield job
            elif record.get("status") == RECOVERING and not task.session.new:
                why = f"job {os.path.basename(folder)}, the same request, is being recovered"
                hint = "wait for that; --new sends another"
                raise Failure(why, EXIT_UNKNOWN, code="under_way", hint=hint)


def adopt_job(task: Task) -> Job | None:
    """Return an unfinished job of the same request whose script is dead, to be finished.

    It counts where its curl still lives or bytes of its answer have come (P2); each such job is
    taken by one process only.
    """
    for job in same_jobs(task):
        if curl_lives(job) or job.answered:
            return job._replace(resumed=True)
        if job.untouched:
            remove_job(job)
            continue
        job.lock.close()
        task.console.warn(f"job {job.id}, the same request, ended without an answer: maybe billed")
    return None


def set_aside_jobs(task: Task) -> None:
    """Make --new stick: what it passes over is not resumed by later calls either."""
    for job in same_jobs(task):
        set_status(job, "set aside")
        job.lock.close()


def take_job(folder: str) -> Job | None:
    """Return a job that this process now holds, or None while another does or it is gone."""
    record = os.path.join(folder, RECORD)
    try:  # the record is written last, so a job that is being made is not touched
        lock = try_lock(os.path.join(folder, LOCK)) if os.path.exists(record) else None
    except OSError:
        return None
    if lock and not os.path.exists(record):
        lock.close()
        return None
    return Job(folder, lock) if lock else None


def curl_lives(job: Job) -> bool:
    """Return whether the job's curl still runs: it holds the lock on its own output file."""
    return line_locked(job.path(CURL_LINE))


def line_locked(path: str) -> bool:
    """Return whether a curl writes its write-out line to this file."""
    try:
        lock = try_lock(path) if os.path.exists(path) else None
    except OSError:
        return False
    if lock:
        lock.close()
    return lock is None and os.path.exists(path)


def set_status(job: Job, status: str) -> None:
    """Note in job.json how far a job that stays is."""
    record = read_record(job.folder)
    try:
        if record:
            write_record(job.folder, {**record, "status": status})
    except OSError:
        pass  # the note is a comfort; the answer is what must stay


def remove_job(job: Job) -> None:
    """Remove a job whose pictures are all saved, or that was surely not served.

    The record goes first: without it a folder is dead for everybody, should we be killed here.
    """
    remove_file(job.path(RECORD))
    job.lock.close()
    remove_folder(job.folder)


def remove_folder(folder: str) -> None:
    """Remove a folder and what is in it, as far as that can be done."""
    try:
        for entry in list(os.scandir(folder)):
            remove = remove_folder if entry.is_dir(follow_symlinks=False) else remove_file
            remove(entry.path)
        os.rmdir(folder)
    except OSError:
        pass


def blank_secrets(job: Job, console: Console) -> None:
    """Overwrite every echo of the key in the files of a job that stays, byte for byte.

    In the answer only what is too long to stand in a picture's base64 by chance.
    """
    for name in os.listdir(job.folder):
        for secret in console.secrets:
            if name.endswith(HEADERS) or (name == ANSWER and len(secret) >= 12):
                try:
                    blank_in_file(job.path(name), secret.encode("utf-8", "surrogateescape"))
                except OSError:
                    continue


def blank_in_file(path: str, secret: bytes) -> None:
    """Replace a secret in a file by asterisks of the same length, window by window."""
    position = 0
    with open(path, "r+b") as file:
        while True:
            file.seek(position)
            window = file.read(WINDOW)
            found = window.find(secret)
            if found >= 0:
                file.seek(position + found)
                file.write(b"*" * len(secret))
                position += found + len(secret)
            elif len(window) < WINDOW:
                return
            else:
                position += WINDOW - len(secret) + 1


def sweep_jobs() -> None:
    """Remove what ended without a byte, and what never became a job, a week after it began."""
    oldest = job_stamp(time.time() - 86400 * KEEP_EMPTY_DAYS)
    for folder in job_folders():
        if os.path.basename(folder)[:16] >= oldest:
            break
        job = take_job(folder)
        if job and not job.answer_size() and not curl_lives(job):
            remove_job(job)
        elif job:
            job.lock.close()
        elif not os.path.exists(os.path.join(folder, RECORD)):
            remove_folder(folder)


################################################################################
# Curl
################################################################################
# The one door to the network: `curl -q -K -`, one process for each paid POST. The config, key and
# all, is an unnamed temporary file that is curl's standard input. Options are no newer than 7.58.

WRITE_OUT = "%{http_code} %{size_request} %{size_upload} %{num_connects} %{redirect_url}"


class Watch:
    """Looks at an answer as it comes; a plain one only tells how many bytes there are."""

    tick = 30.0  # seconds between looks
    usual = ""  # how long the answer usually takes

    def __init__(self, path: str) -> None:
        self.path = path

    def look(self) -> int:
        """Return how many bytes have come."""
        return file_size(self.path)


def curl_line(option: str, value: str) -> bytes:
    """Return one line of curl's config. Quotes and backslashes are escaped, controls refused.

    Inside double quotes curl knows backslash escapes only; a raw line break would begin a new
    option, an escaped one would forge a header (tried on ten versions).
    """
    data = value.encode("utf-8", "surrogateescape")
    if re.search(b"[\x00-\x1f\x7f]", data):
        raise Failure(f"{option}: {value!a} holds control characters")
    escaped = data.replace(b"\\", b"\\\\").replace(b'"', b'\\"')
    return option.encode("ascii") + b' = "' + escaped + b'"\n'


def form_file(path: str) -> str:
    """Return a path as a form value quotes it, so that ; and , in it mean nothing."""
    return '"' + path.replace("\\", "\\\\").replace('"', '\\"') + '"'


def connection_lines(settings: Settings, url: str, host: str) -> list[bytes]:
    """Return the config lines that every call shares."""
    lines = [
        b"silent\nshow-error\ngloboff\nhttp1.1\n",
        curl_line("url", url),
        curl_line("proto", "=https,http"),
        curl_line("user-agent", settings.user_agent),
        b"connect-timeout = %d\n" % settings.connect_timeout,
        b"max-time = %d\n" % settings.timeout,
        b"keepalive-time = 30\n",  # NATs forget a connection that is silent for minutes
        curl_line("write-out", WRITE_OUT),
    ]
    if is_loopback(host):
        lines.append(curl_line("noproxy", "*"))
    elif settings.proxy:
        lines.append(curl_line("proxy", settings.proxy))
    if settings.cacert:
        lines.append(curl_line("cacert", os.path.expanduser(settings.cacert)))
    return lines


def key_lines(settings: Settings) -> list[bytes]:
    """Return the header lines that carry the key and the user's own headers."""
    lines = [curl_line("header", f"{name}: {text}") for name, text in settings.headers]
    if settings.key:
        name, _, scheme = settings.auth_header.partition(":")
        value = f"{scheme.strip()} {settings.key}".strip()
        lines.append(curl_line("header", f"{name}: {value}"))
    return lines


def request_lines(request: Request, settings: Settings, job_id: str) -> list[bytes]:
    """Return the config lines of the paid POST but for its body."""
    url = f"{settings.base.url}/images/{request.endpoint}"
    lines = [*connection_lines(settings, url, settings.base.host), *key_lines(settings)]
    lines.append(curl_line("header", "Expect:"))  # else a stall of a second over 1 MB
    if settings.provider.name == "openai" and job_id:
        lines.append(curl_line("header", f"X-Client-Request-Id: {job_id}"))
    if request.endpoint == "generations":
        lines.append(curl_line("header", "Content-Type: application/json"))
    lines.append(b"no-buffer\n")  # else up to 4 KB are lost with a curl that is killed
    return lines


def post_config(job: Job, task: Task) -> bytes:
    """Return curl's config for the paid POST, everything long or secret in files."""
    lines = request_lines(task.request, task.settings, job.id)
    if task.request.endpoint == "generations":
        lines.append(curl_line("data-binary", "@" + job.path("body.json")))
    else:
        lines += form_lines(job, task.request, task.settings.image_field)
    lines.append(curl_line("output", job.path(ANSWER)))
    lines.append(curl_line("dump-header", job.path(HEADERS)))
    return b"".join(lines)


def form_lines(job: Job, request: Request, image_field: str) -> list[bytes]:
    """Return the multipart fields and files; local names don't leave the machine."""
    lines = []
    for index, (name, text) in enumerate(form_fields(request)):
        if goes_by_file(name, text):
            field_path = job.path(f"field-{index}.txt")
            lines.append(curl_line("form", f"{name}=<{form_file(field_path)}"))
        else:
            lines.append(curl_line("form-string", f"{name}={text}"))
    for name, path, media, file_name in form_files(request, image_field):
        lines.append(form_file_line(name, path or job.path("mask.png"), file_name, media))
    return lines


def form_file_line(name: str, path: str, file_name: str, media: str) -> bytes:
    """Return the config line that sends a file under another name."""
    return curl_line("form", f"{name}=@{form_file(path)};filename={file_name};type={media}")


def form_files(request: Request, image_field: str) -> list[tuple[str, str, str, str]]:
    """Return (part name, path, media type, file name sent) of each file; "" is the drawn mask."""
    images = sum(file.field == "image" for file in request.files)
    field = image_field
    if image_field == "auto":
        field = "image" if images == 1 else "image[]"
    parts = []
    for index, file in enumerate(request.files):
        suffixes, media = FORMATS[file.info.format]
        name = field if file.field == "image" else file.field
        number = f"-{index + 1}" if file.field == "image" and images > 1 else ""
        parts.append((name, file.path, media, f"{file.field}{number}.{suffixes[0]}"))
    return parts


def find_curl() -> str:
    """Return the path of curl, never one from the current folder. Failure (exit 3) without one."""
    system = os.path.join(os.environ.get("SYSTEMROOT", ""), "System32", "curl.exe")
    places = filter(os.path.isabs, os.environ.get("PATH", os.defpath).split(os.pathsep))
    name = "curl.exe" if os.name == "nt" else "curl"
    found = [os.path.join(place, name) for place in places]
    if os.name == "nt" and os.path.isabs(system):
        found.insert(0, system)
    for path in found:
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    raise Failure("curl is not installed", EXIT_CONFIG, code="curl_missing", hint="install it")


def curl_environment(secrets: Sequence[str]) -> dict[str, str]:
    """Return the environment for curl: no variable that names or holds a key, or TLS secrets."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not SECRET_NAMES.search(name) and not any(secret in value for secret in secrets)
    }
    return {**kept, "LC_ALL": "C"}


def run_curl(
    config: bytes,
    line_path: str,
    session: Session,
    watch: Watch,
    arguments: Sequence[str] = ("-q", "-K", "-"),
) -> CurlEnd:
    """Run curl once on a config and return how it ended; the only place that starts one.

    Its standard output, the write-out line, goes to `line_path`, which it holds locked while it
    lives. `watch` looks at the answer as it comes. A signal gives an answer that has begun 10 s.
    """
    started, stopped, errors = time.monotonic(), 0, b""
    try:
        process = start_curl(config, line_path, session.console.secrets, arguments)
    except OSError as error:
        raise config_failure(f"curl can't be started: {os_reason(error)}") from None
    try:
        with SIGNALS:
            errors = wait_for_curl(process, session, watch, 0)
    except Interrupted as stop:
        stopped = stop.number
        errors = stop_curl(process, session, watch)
        if SIGNALS.in_main:
            SIGNALS.number = 0  # CurlEnd carries it now; an answer that came is saved all the same
    status, sent = read_curl_line(line_path)
    message = session.console.scrub(printable(errors.decode("utf-8", "replace"), 300))
    seconds = time.monotonic() - started
    return CurlEnd(process.returncode, status, sent, message, seconds, stopped)


def start_curl(
    config: bytes, line_path: str, secrets: Sequence[str], arguments: Sequence[str]
) -> Any:
    """Start curl with its config as standard input, from a file that has no name."""
    import subprocess

    with open(line_path, "wb"):
        pass
    line_file = try_lock(line_path)
    with unnamed_file(os.path.dirname(line_path)) as stdin:
        stdin.write(config)
        stdin.seek(0)
        process = subprocess.Popen(
            [find_curl(), *arguments],
            stdin=stdin,
            stdout=line_file or subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=curl_environment(secrets),
            start_new_session=True,  # Ctrl-C in the terminal is for us alone
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)  # and on Windows
            | getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
    if line_file:
        line_file.close()
    return process


def wait_for_curl(process: Any, session: Session, watch: Watch, limit: float) -> bytes:
    """Wait until curl ends (or for `limit` seconds), showing progress; return its stderr.

    communicate() returns the moment that curl closes its end, where wait() would poll.
    """
    import subprocess

    progress = Progress(session.console, watch.usual)
    # Only the main thread of a POSIX system is woken by a signal.
    woken = SIGNALS.in_main and os.name == "posix"
    tick = min(progress.interval, watch.tick, 30.0 if woken else 1.0)
    try:
        while True:
            try:
                errors: bytes = process.communicate(timeout=limit or tick)[1]
                return errors
            except subprocess.TimeoutExpired:
                if limit:
                    raise
                if SIGNALS.number:
                    raise Interrupted(SIGNALS.number) from None
                progress.tick(watch.look())
    finally:
        progress.stop()


def stop_curl(process: Any, session: Session, watch: Watch) -> bytes:
    """End curl after a signal: an answer that has begun gets 10 s first, a second signal none."""
    import subprocess

    detached = session.keeper.detached
    try:
        if process.poll() is None and (detached or watch.look()):
            session.console.say(f"stopping; the answer gets {STOP_GRACE_SECONDS:.0f} s to finish")
            return wait_for_curl(process, session, watch, STOP_GRACE_SECONDS)
    except (Interrupted, subprocess.TimeoutExpired):
        pass
    if detached:
        return b""
    process.terminate()
    try:
        errors: bytes = process.communicate()[1]
    except Interrupted:
        return b""
    return errors


def read_curl_line(path: str) -> tuple[int, int]:
    """Return (HTTP status, request bytes that left) of a write-out line; (0, -1) without one."""
    try:
        with open(path, "rb") as file:
            words = file.read(4096).split()
        return int(words[0]), int(words[1]) + int(float(words[2]))
    except (OSError, ValueError, IndexError):
        return 0, -1


def read_headers_file(path: str) -> dict[str, str]:
    """Return what curl's dump-header wrote; nothing where it wrote nothing."""
    try:
        with open(path, "rb") as file:
            return parse_headers(file.read(MEGABYTE))
    except OSError:
        return {}


def parse_headers(data: bytes) -> dict[str, str]:
    """Return the last header block by lower-case name; a proxy's own block comes before it."""
    blocks = re.split(rb"\r?\n\r?\n", data.strip())
    lines = blocks[-1].decode("latin-1").splitlines()
    pairs = (line.partition(":") for line in lines[1:])
    found = {name.strip().lower(): value.strip() for name, _, value in pairs}
    status = re.match(r"HTTP/[0-9.]+ ([0-9]{3})", lines[0]) if lines else None
    return {**found, ":status": status[1]} if status else found


################################################################################
# Replies
################################################################################
# From the answer's file to values, without ever holding the answer: a scanner copies its text and
# leaves long strings (the pictures) in the file as Spans; json.loads sees only the small rest.


class Skeleton:
    """The text of an answer with its long strings replaced by marks, fed window by window.

    A mark is a random word and two offsets, so that no server can forge one. In an event stream
    (`lines`) a line break ends a string that was left open.
    """

    def __init__(self, lines: bool) -> None:
        self.lines = lines
        self.text = bytearray()
        self.nonce = os.urandom(8).hex()
        self.offset = 0  # of the next window in the file
        self.start = -1  # of the string we are in, after its quote; -1 outside
        self.kept = bytearray()  # the head of that string
        self.odd_slash = False  # that string's last byte so far is an unpaired backslash

    def feed(self, window: bytes) -> None:
        """Take the next bytes of the answer. Raises ValueError where it is no usable answer."""
        position = 0
        while position < len(window):
            if self.start < 0:
                position = self._copy_outside(window, position)
            else:
                position = self._skip_string(window, position)
        self.offset += len(window)
        if len(self.text) > MAX_SKELETON_BYTES:
            raise ValueError("the answer has too much text beside its pictures")

    def _copy_outside(self, window: bytes, position: int) -> int:
        quote = window.find(b'"', position)
        end = len(window) if quote < 0 else quote + 1
        self.text += window[position:end]
        if quote >= 0:
            self.start = self.offset + end
            self.kept.clear()
            self.odd_slash = False
        return end

    def _skip_string(self, window: bytes, position: int) -> int:
        quote = window.find(b'"', position)
        if self.lines:
            newline = window.find(b"\n", position, quote if quote >= 0 else len(window))
            if newline >= 0:
                self.text += b'"'  # what stood open is no JSON anyway
                self.start = -1
                return newline
        end = len(window) if quote < 0 else quote
        body = window[position:end]
        slashes = len(body) - len(body.rstrip(b"\\"))
        odd = bool(slashes % 2) != (self.odd_slash and slashes == len(body))
        if len(self.kept) <= LONG_STRING:
            self.kept += body
        if quote < 0 or odd:
            self.odd_slash = odd and quote < 0
            if quote >= 0 and len(self.kept) <= LONG_STRING:
                self.kept += b'"'
            return end + (quote >= 0)
        self._close_string(self.offset + end)
        return end + 1

    def _close_string(self, end: int) -> None:
        if end - self.start <= LONG_STRING:
            self.text += self.kept + b'"'
        else:
            self.text += f'{self.nonce}:{self.start}:{end}"'.encode("ascii")
        self.start = -1

    def span(self, value: Any) -> Any:
        """Return the Span that a parsed string is the mark of, else the value itself."""
        if isinstance(value, str) and value.startswith(self.nonce):
            _, start, end = value.split(":")
            return Span(int(start), int(end))
        return value


EVENT_LINE = re.compile(rb"(?:data|event|id|retry|)\s*:")


def answer_kind(first: bytes) -> str:
    """Return what an answer is by its first bytes: json, events, html, text or empty."""
    if not first:
        return "empty"
    if first[:1] in b"{[":
        return "json"
    if EVENT_LINE.match(first):
        return "events"
    return "html" if first[:1] == b"<" else "text"


def read_reply(path: str, salvage: bool = False) -> Reply:
    """Return what an answer's file holds; `salvage` takes whole pictures from a cut one too.

    Leading blank lines (a relay's keep-alive) and a BOM are skipped; the body's own first bytes
    decide what it is, not its Content-Type.
    """
    unpack(path)
    try:
        with open(path, "rb") as file:
            info = inspect_picture(file)
            if info and info.format != "svg":  # an HTML page of an error may begin like one
                sources = (ImageSource("raw", ""),) if info.whole or salvage else ()
                return Reply("picture", sources, whole=info.whole)
            file.seek(0)
            skipped, window = 0, file.read(WINDOW)
            while window and not window.strip(b"\xef\xbb\xbf \t\r\n"):
                skipped, window = skipped + len(window), file.read(WINDOW)
            first = window.lstrip(b"\xef\xbb\xbf \t\r\n")
            skeleton = Skeleton(answer_kind(first) == "events")
            skeleton.offset = skipped + len(window) - len(first)
            return scan_reply(file, first, skeleton, salvage)
    except OSError:
        return Reply("empty")


def unpack(path: str) -> None:
    """Undo the gzip that some servers send unasked; what can't be unpacked stays as it is."""
    try:
        with open(path, "rb") as file:
            if file.read(2) != b"\x1f\x8b":
                return
            from zlib import decompressobj, error

            file.seek(0)
            packer, temporary = decompressobj(31), f"{path}.unpacked"
            try:
                with open(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600), "wb") as unpacked:
                    for window in iter(lambda: file.read(WINDOW), b""):
                        unpacked.write(packer.decompress(window))
                os.replace(temporary, path)
            except (OSError, error):
                remove_file(temporary)
    except OSError:
        pass


def scan_reply(file: IO[bytes], first: bytes, skeleton: Skeleton, salvage: bool) -> Reply:
    """Scan the rest of an answer and return what it holds."""
    kind = answer_kind(first)
    excerpt = printable(first[:4000].decode("utf-8", "replace"), 4000)
    if kind not in ("json", "events"):
        return Reply(kind, excerpt=excerpt)
    window = first
    try:
        while window:
            skeleton.feed(window)
            window = file.read(WINDOW)
    except ValueError:
        return Reply(kind, excerpt=excerpt)
    text = skeleton.text.decode("utf-8", "replace")
    documents = parse_events(text) if kind == "events" else parse_documents(text)
    reply = reply_from_documents(kind, documents, skeleton)._replace(excerpt=excerpt)
    if salvage and not (reply.whole and reply.images):
        return reply._replace(images=salvage_images(text, skeleton))
    return reply


# Raw line breaks in base64 are harmless; absurd numbers (5,000 digits, 1e999) are taken for 0.
DECODER = json.JSONDecoder(
    strict=False,
    parse_int=lambda digits: int(digits) if len(digits) < 16 else 0,
    parse_float=lambda digits: float(digits) if abs(float(digits)) < 1e15 else 0.0,
    parse_constant=lambda name: None,  # NaN, Infinity
)
BLANKS = re.compile(r"[ \t\r\n]*")


def parse_json(text: str) -> list[Any]:
    """Return the one JSON value in a text, or nothing for one that is cut, too deep or none."""
    try:
        return [DECODER.decode(text)]
    except (ValueError, RecursionError):
        return []


def parse_documents(text: str) -> list[Any]:
    """Return the JSON values that a text begins with; none if it ends within the first.

    A relay's lines of waiting may come before the answer, and a gateway's comment after it.
    """
    found: list[Any] = []
    position = 0
    try:
        while True:
            blank = BLANKS.match(text, position)
            value, position = DECODER.raw_decode(text, blank.end() if blank else position)
            found.append(value)
    except (ValueError, RecursionError):
        return found


def event_blocks(text: str) -> list[str]:
    """Return the events of a stream's text, each with its lines."""
    return re.split(r"\r?\n\r?\n", text)


def parse_events(text: str) -> list[Any]:
    """Return the JSON values of an event stream's data, in order; what is no JSON is skipped.

    An event's name stands in for a `type` that its data lacks.
    """
    found = []
    for block in event_blocks(text):
        data = re.findall(r"^data:[ ]?(.*?)\r?$", block, re.M)
        name = re.search(r"^event:[ ]?(.*?)\r?$", block, re.M)
        for value in parse_json("\n".join(data)):
            if name and isinstance(value, dict):
                value = {"type": name[1], **value}
                if name[1] == "error" and "error" not in value:
                    value = {"error": value}
            found.append(value)
    return found


def reply_from_documents(kind: str, documents: list[Any], skeleton: Skeleton) -> Reply:
    """Return the reply in the parsed values: one of them for JSON, one an event for a stream."""
    images: list[ImageSource] = []
    error: ApiError | None = None
    usage: dict[str, Any] | None = None
    for document in documents:
        if isinstance(document, list) and document and isinstance(document[0], dict):
            document = document[0] if "error" in document[0] else document
        value = document if isinstance(document, dict) else {"data": document}
        if "partial_image" in str(value.get("type")):
            continue
        images += image_sources(value, skeleton)
        error = error or parse_error(value, skeleton)
        if isinstance(value.get("usage"), dict):
            usage = add_usage(usage or {}, value["usage"])
    whole = bool(documents) if kind == "json" else bool(images)
    return Reply(kind, tuple(images), error, usage, whole)


def add_usage(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Return two usage objects added up: a stream tells each picture's own."""
    total = dict(first)
    for name, value in second.items():
        before = first.get(name)
        if isinstance(value, dict) and isinstance(before, dict):
            total[name] = add_usage(before, value)
        elif isinstance(value, (int, float)) and isinstance(before, (int, float)):
            total[name] = before + value
        else:
            total[name] = value
    return total


def image_sources(value: dict[str, Any], skeleton: Skeleton) -> list[ImageSource]:
    """Return the pictures of one JSON value: `data` as documented, or a relay's own place."""
    alone = [] if parse_error(value, skeleton) else value  # an error may name a page to read, too
    entries: Any = next((value[k] for k in ("data", "images", "image_urls") if value.get(k)), alone)
    if isinstance(entries, dict) and entries is not value and "data" in entries:
        entries = entries["data"]
    found = []
    for entry in entries if isinstance(entries, list) else [entries]:
        source = image_source(entry, skeleton)
        if source:
            found.append(source)
    return found


def image_source(entry: Any, skeleton: Skeleton) -> ImageSource | None:
    """Return where one entry's picture is; empty strings and nulls beside it mean nothing."""
    fields = entry if isinstance(entry, dict) else {"url": entry}
    if isinstance(entry, str) and not re.match("https?://|data:|/", entry, re.I):
        fields = {"b64_json": entry if len(entry) > 100 else None}
    prompt = fields.get("revised_prompt")
    revised = prompt if isinstance(prompt, str) and prompt == skeleton.span(prompt) else None
    for name in ("b64_json", "url", "image_url", "b64", "image_base64"):
        value = skeleton.span(fields.get(name))
        if isinstance(value, dict):
            value = skeleton.span(value.get("url"))
        if not value or not isinstance(value, (str, Span)):
            continue
        linked = isinstance(value, str) and value[:5].lower() != "data:"
        if linked and ("url" in name or re.match("https?://", str(value), re.I)):
            return ImageSource("url", value, revised or None)
        return ImageSource("base64", value, revised or None)
    return None


PICTURE_STRING = re.compile(r'"(?:b64_json|url)"\s*:\s*"((?:[^"\\]|\\.)*)"')


def salvage_images(text: str, skeleton: Skeleton) -> tuple[ImageSource, ...]:
    """Return the complete pictures in a cut answer; of a stream only what says that it is one."""
    found = []
    for block in event_blocks(text) if skeleton.lines else [text]:
        if skeleton.lines and ("partial_image" in block or ".completed" not in block):
            continue
        for match in PICTURE_STRING.finditer(block):
            name = match[0][1:].partition('"')[0]
            for value in parse_json(f'{{"{name}": "{match[1]}"}}'):
                source = image_source(value, skeleton)
                found += [source] if source else []
    return tuple(found)


def parse_error(value: dict[str, Any], skeleton: Skeleton) -> ApiError | None:
    """Return the error in one JSON value, in whichever of the known shapes it comes."""
    error = value.get("error")
    error = error[0] if isinstance(error, list) and error else error
    told = value.get("message") if isinstance(value.get("message"), str) else value.get("detail")
    if not error and not value.get("data") and told:
        error = {**value, "message": told}
    if not error:
        return None
    if not isinstance(error, dict):
        error = {"message": error, "code": value.get("code")}
    message = error.get("message") or error.get("detail") or error
    text = message if isinstance(message, str) else json.dumps(message)
    code = "" if error.get("code") is None else str(error["code"])
    kind = str(error.get("type") or "")  # cut only after the key is blanked, lest half of it show
    parts = (part if skeleton.nonce not in part else "(a long text)" for part in (code, text, kind))
    return ApiError(*(printable(part, 20_000) for part in parts))


def span_pieces(file: IO[bytes], span: Span) -> Iterator[bytes]:
    """Yield a long JSON string's text in windows, its escapes undone."""
    file.seek(span.start)
    left, rest = span.end - span.start, b""
    while left > 0:
        window = file.read(min(WINDOW, left))
        if not window:
            return
        left -= len(window)
        piece = rest + window
        rest = b""
        if b"\\" in piece:
            if left:  # an escape may be cut by the window's end
                last = piece.rfind(b"\\", max(0, len(piece) - 6))
                cut = len(piece) if last < 0 else len(piece[:last].rstrip(b"\\"))
                piece, rest = piece[:cut], piece[cut:]
            text = json.loads(b'"' + piece + b'"', strict=False)
            piece = text.encode("utf-8", "surrogatepass")
        yield piece


URL_ALPHABET = bytes.maketrans(b"-_", b"+/")
DATA_PREFIX = re.compile(rb"\s*data:[^,]{0,200},", re.I)


def decode_base64(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the bytes of base64 text in any dressing: data: prefix, wrapped, URL-safe, unpadded.

    The decoded length shows whether binascii dropped junk in silence, at no cost. Raises
    ValueError for text that is no base64.
    """
    from binascii import Error, a2b_base64

    rest, ended, first = b"", False, True
    for piece in pieces:
        if first:
            prefix, first = DATA_PREFIX.match(piece), False  # sub() would search the whole window
            piece = piece[prefix.end() :] if prefix else piece
        text = rest + piece
        whole = len(text) // 4 * 4
        try:
            decoded = a2b_base64(text[:whole])
        except Error:
            decoded = b""
        if not ended and len(decoded) == whole // 4 * 3:
            rest = text[whole:]
        else:
            decoded, rest, ended = decode_dressed(text, ended)
        yield decoded
    yield decode_dressed(rest + b"=" * (-len(rest) % 4), ended)[0]


def decode_dressed(text: bytes, ended: bool) -> tuple[bytes, bytes, bool]:
    """Decode base64 with white space, the URL alphabet or padding: (bytes, rest, padding seen)."""
    from binascii import Error, a2b_base64

    text = text.translate(URL_ALPHABET, b" \t\r\n\f\v")
    bare = text.rstrip(b"=")
    padded = len(bare) < len(text)
    whole = len(bare) // 4 * 4
    tail = bare[whole:] if padded else b""
    try:
        decoded = a2b_base64(bare[:whole])
        decoded_tail = a2b_base64(tail + b"=" * (-len(tail) % 4))
    except Error:
        raise ValueError("it is not base64") from None
    expected = (whole // 4 * 3, len(tail) * 3 // 4)
    if (len(decoded), len(decoded_tail)) != expected or (ended and bare) or len(tail) == 1:
        raise ValueError("it is not base64")
    return decoded + decoded_tail, b"" if padded else bare[whole:], ended or padded


################################################################################
# Verdicts
################################################################################
# What an attempt came to: ok, refused, unsent or unknown. Pure: values in, a Verdict out.


def judge(end: CurlEnd, headers: dict[str, str], reply: Reply, settings: Settings) -> Verdict:
    """Return the verdict on one attempt. A picture that came is ok, whatever came around it."""
    status = end.status or int(headers.get(":status", "0"))
    if reply.images and reply.whole:
        return Verdict("ok")
    if status < 200:
        return judge_silence(end, settings)
    if 300 <= status < 400:
        target = printable(re.sub(r"[?#].*", "", headers.get("location", "")), 200)
        message = f"HTTP {status}: the server points elsewhere{target and f', to {target}'}"
        failure = Failure(message, EXIT_REFUSED, hint="the base URL is wrong", http_status=status)
        return Verdict("refused", failure)
    if status < 300:
        return judge_no_image(end, reply, status)
    if status in (408, 409) or status >= 500:
        return judge_server_error(headers, reply, status)
    return judge_refusal(headers, reply, status)


def judge_silence(end: CurlEnd, settings: Settings) -> Verdict:
    """Judge an attempt without an HTTP answer by curl's exit code and what it had sent."""
    row = CURL_EXITS.get(end.code or 0, CurlExit("curl ended without an answer"))
    unsent = row.unsent or (end.sent == 0 and not end.signal)
    if end.code is None and unsent:
        row = NOT_STARTED
    if end.code == 28 and unsent:
        row = CONNECT_TIMEOUT
    if end.code == 28 and not unsent:
        row = row._replace(sentence=f"no full answer came in {settings.timeout} s")
    where = f"{settings.base.host}:{settings.base.port}"
    words = end.message.partition(") ")[2] or end.message
    detail = f" ({words})" if words else ""
    if unsent:
        exit_code = EXIT_REFUSED if end.code in (2, 3, 26) else EXIT_NETWORK
        message = f"{where}: {row.sentence}{detail}; nothing was sent"
        return Verdict("unsent", Failure(message, exit_code, hint=row.hint), row.retry)
    if end.signal or (end.code or 0) < 0:
        return unknown("the request was stopped before its answer came", 0)
    return unknown(f"{where}: {row.sentence}{detail}", 0, row.hint)


def unknown(
    message: str,
    status: int,
    hint: str = "",
    code: str = "",
    billed: str = "it may have been billed",
) -> Verdict:
    """Return the verdict for an outcome that nobody knows."""
    failure = Failure(
        f"{message}; {billed}",
        EXIT_UNKNOWN,
        code=code,
        hint=hint,
        maybe_billed=True,
        http_status=status or None,
    )
    return Verdict("unknown", failure)


def free_failure(lead: str, end: CurlEnd) -> Failure:
    """Return the failure of a call that costs nothing, and so may be made again."""
    words = CURL_EXITS.get(end.code or 0, CurlExit(f"HTTP {end.status}")).sentence
    exit_code = EXIT_REFUSED if end.status else EXIT_NETWORK
    failure = Failure(f"{lead}{words}", exit_code, http_status=end.status or None)
    failure.passing = not end.status or end.status < 300 or end.status >= 500
    return failure


def judge_no_image(end: CurlEnd, reply: Reply, status: int) -> Verdict:
    """Judge a 2xx without a picture: an error inside it, an unreadable body, or nothing."""
    if reply.error:
        code, known = reply.error.code or reply.error.type, known_error(reply.error)
        if not known and re.fullmatch("4(?!08|09)[0-9][0-9]", reply.error.code):
            known = (STATUS_EXITS.get(int(reply.error.code), EXIT_REFUSED), "")
        if known:
            return refuse_with(reply.error, status, *known)
        return unknown(f"HTTP {status} with {error_text(reply.error)}", status, "", code)
    if end.code:
        row = CURL_EXITS.get(end.code, CurlExit(f"curl ended with {end.code}"))
        return unknown(f"HTTP {status}, but {row.sentence}", status, row.hint)
    if reply.kind == "events":
        return unknown("the stream ended without its picture", status)
    if reply.kind == "json" and reply.whole:
        return unknown(f"HTTP {status} without a picture", status, code="no_image")
    what = {"json": "the JSON is cut or broken", "empty": "the body is empty"}
    why = what.get(reply.kind, f"the body is {reply.kind}: {reply.excerpt[:100]!r}")
    return unknown(f"HTTP {status}, but {why}", status)


def known_error(error: ApiError) -> tuple[int, str] | None:
    """Return the exit code and hint of an error that the API is known for."""
    if POLICY_MARK in error.message:
        return EXIT_POLICY, POLICY_HINT
    return API_ERRORS.get(error.code) or API_ERRORS.get(error.type)


def error_text(error: ApiError | None, fallback: str = "") -> str:
    """Return an API error as one piece of a line."""
    if not error:
        return fallback
    code = error.code or error.type
    return f"{code}: {error.message}" if code and code not in error.message else error.message


def refuse_with(error: ApiError, status: int, exit_code: int, hint: str) -> Verdict:
    """Return the refusal that the API worded."""
    message = f"HTTP {status} {error_text(error)}".rstrip(". ")
    failure = Failure(message, exit_code, code=error.code or error.type, hint=hint)
    failure.http_status = status
    return Verdict("refused", failure)


def judge_server_error(headers: dict[str, str], reply: Reply, status: int) -> Verdict:
    """Judge 408, 409 and 5xx: unknown, but for a 503 that says itself to come again.

    Relays wrap upstream time-outs that were billed in JSON 500s (new-api#556, #2974).
    """
    wait = retry_after(headers)
    code = reply.error.code if reply.error else ""
    if status == 503 and (wait is not None or code in OVERLOAD_CODES):
        error = reply.error or ApiError("", "the server is overloaded")
        verdict = refuse_with(error, status, EXIT_LIMIT, BUSY_HINT)
        return verdict._replace(retry=True, wait=wait)
    words = error_text(reply.error, reply.excerpt[:100] if reply.kind == "text" else "")
    hint = GATEWAY_HINT if status in GATEWAY_STATUSES else ""
    return unknown(f"HTTP {status} {words}".rstrip(". "), status, hint, code)


def judge_refusal(headers: dict[str, str], reply: Reply, status: int) -> Verdict:
    """Judge a 4xx: the API's code decides before the status; only a plain 429 is tried again."""
    error = reply.error or ApiError("", reply.excerpt[:100] if reply.kind == "text" else "")
    known = known_error(error)
    exit_code = STATUS_EXITS.get(status, EXIT_REFUSED)
    hint = STATUS_HINTS.get(status, "")
    if known and (known[0] in (EXIT_POLICY, EXIT_LIMIT) or exit_code == EXIT_REFUSED):
        exit_code, hint = known
    if status == 403 and UNVERIFIED_MARK in error.message:
        hint = "verify the organisation at platform.openai.com (takes up to 15 minutes)"
    verdict = refuse_with(error, status, exit_code, hint)
    again = status == 429 and hint != QUOTA_HINT
    return verdict._replace(retry=again, wait=retry_after(headers) if again else None)


def retry_after(headers: dict[str, str]) -> float | None:
    """Return the seconds to wait that the server asks for (ms, s or a date), or None."""
    from email.utils import mktime_tz, parsedate_tz

    number = re.compile(r"[0-9]{1,12}(\.[0-9]*)?")
    milliseconds, seconds = headers.get("retry-after-ms", ""), headers.get("retry-after", "")
    if number.fullmatch(milliseconds):
        return float(milliseconds) / 1000
    if number.fullmatch(seconds):
        return float(seconds)
    date = parsedate_tz(seconds) if seconds else None
    try:
        return max(0.0, mktime_tz(date) - time.time()) if date else None
    except (ValueError, OverflowError):
        return None


def retry_delay(attempt: int, wait: float | None) -> float:
    """Return the seconds before attempt + 1: what the server asks, else exponential with jitter."""
    from random import uniform

    if wait is not None:
        return wait
    return min(0.5 * float(2**attempt), 30.0) * uniform(0.75, 1.0)


################################################################################
# Downloads
################################################################################
# Pictures that come as a link: fetched without the key, resumed, retried, each hop checked.

PRINTABLE = "".join(map(chr, range(33, 127)))  # what curl may send as it stands
MAX_REDIRECTS = 3
MAX_FETCHES = 4
REDIRECTS = (301, 302, 303, 307, 308)


class Link(NamedTuple):
    """A checked link: its parts, and the address that curl must use (None: its own lookup)."""

    url: str
    scheme: str
    host: str
    port: int
    address: str | None = None

    def same_origin(self, base: BaseUrl) -> bool:
        """Return whether this is exactly the base's scheme, host and port."""
        return (self.scheme, self.host, self.port) == (base.scheme, base.host, base.port)


def check_link(url: str, task: Task) -> Link:
    """Return a link that may be fetched. Raises Failure for one that leads to a private place."""
    from urllib.parse import quote, urljoin, urlsplit

    settings = task.settings
    full = quote(urljoin(settings.base.url + "/", url.strip()), safe=PRINTABLE)
    try:
        parts = urlsplit(full)
        host = (parts.hostname or "").rstrip(".")
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        raise link_failure("the picture's link is malformed") from None
    odd = re.search("[@%]", parts.netloc)  # curl decodes %31%32%37.0.0.1, and so must a guard
    if parts.scheme not in ("http", "https") or not host or odd:
        raise link_failure(f"the picture's link is not http(s): {printable(full, 100)}")
    if parts.scheme == "http" and settings.base.scheme == "https":
        task.console.warn(f"the picture comes over plain http from {printable(host, 100)}")
    address = check_host(host, port, settings)
    return Link(full.partition("#")[0], parts.scheme, host, port, address)


def link_failure(message: str, hint: str = "") -> Failure:
    """Return the failure for one picture that can't be fetched; the answer stays."""
    return Failure(message, EXIT_UNSAVED, code="download_failed", hint=hint)


def check_host(host: str, port: int, settings: Settings) -> str | None:
    """Return the address to pin a link's host to; Failure for one that is not on the internet.

    The base's own host may be anything, loopback spellings being one host. Behind a proxy only
    literal addresses are checked, as the proxy does the lookup.
    """
    import socket

    base = settings.base
    if settings.allow_private or host == base.host or (is_loopback(host) and base.loopback):
        return None
    literal = "127.0.0.1" if is_loopback(host) else literal_address(host)
    found = [literal] if literal else []
    if not literal and not behind_proxy(settings):
        try:
            entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise link_failure(f"{printable(host, 100)} can't be resolved") from None
        found = sorted({str(entry[4][0]).partition("%")[0] for entry in entries}, key=len)
    for address in found:
        if not is_public(address, bool(literal)):
            message = f"the picture's link leads to a private address: {printable(host, 100)}"
            raise link_failure(message, "--allow-private fetches it with recover")
    return found[0] if found and not literal else None


def literal_address(host: str) -> str | None:
    """Return the address that a host spells out, in any form that a resolver takes, or None."""
    import socket

    try:
        return socket.inet_ntoa(socket.inet_aton(host))  # 127.1, 0x7f.1 and 2130706433 too
    except (OSError, UnicodeError):
        return host if ":" in host else None


def is_public(address: str, literal: bool) -> bool:
    """Return whether an address is on the open internet, mapped forms looked through.

    198.18.0.0/15 is what fake-IP proxies such as Clash give every host (PI-Desktop#867).
    """
    from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

    try:
        ip = ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if any(ip in ip_network(net) for net in ("::/96", "64:ff9b::/96", "64:ff9b:1::/48")):
            inner = IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner:
            return is_public(str(inner), literal)
        if ip.is_site_local:
            return False
    if not literal and ip.version == 4 and ip in ip_network("198.18.0.0/15"):
        return True
    return ip.is_global and not ip.is_multicast


def behind_proxy(settings: Settings) -> bool:
    """Return whether curl would go through a proxy, as its own variables say."""
    names = ("https_proxy", "HTTPS_PROXY", "http_proxy", "all_proxy", "ALL_PROXY")
    return bool(settings.proxy or any(os.environ.get(name) for name in names))


def download(url: str, name: str, job: Job, task: Task) -> str:
    """Fetch a picture into the job folder and return its path. Raises Failure where it can't."""
    path, settings = job.path(name), task.settings
    link, hops, tries, with_key = check_link(url, task), 0, 0, False
    while True:
        end, headers = fetch(link, path, job, task, with_key)
        if end.code == 0 and end.status in (200, 206):
            unpack(path)
            return path
        location = headers.get("location")
        if end.status in REDIRECTS and location and hops < MAX_REDIRECTS and not with_key:
            hops += 1
            link = next_hop(link, location, task)
            remove_file(path)
            continue
        refused = end.status in (401, 403)
        if refused and settings.key and not with_key and link.same_origin(settings.base):
            with_key = True
            continue
        tries += 1
        if end.code == 33 or end.status == 416:
            remove_file(path)  # it can't be resumed: start over
        if tries >= MAX_FETCHES or not worth_retrying(end):
            raise link_failure(download_message(end, link), "recover tries again")
        SIGNALS.pause(retry_delay(tries, None))


def next_hop(link: Link, location: str, task: Task) -> Link:
    """Return the checked link that a redirect points to."""
    from urllib.parse import urljoin

    return check_link(urljoin(link.url, location), task)


def worth_retrying(end: CurlEnd) -> bool:
    """Return whether a fetch may do better next time: a GET costs nothing."""
    if end.status >= 400 and end.status != 416:
        return end.status in (408, 425, 429) or end.status >= 500
    return end.code not in (0, 1, 3, 60, 63, 77)


def download_message(end: CurlEnd, link: Link) -> str:
    """Return why a picture could not be fetched."""
    row = CURL_EXITS.get(end.code or 0)
    if end.status >= 300:
        why = f"HTTP {end.status}"
    else:
        why = row.sentence if row else f"curl ended with {end.code}"
    return f"the picture could not be fetched from {printable(link.host, 100)}: {why}"


def resume_lines(path: str) -> list[bytes]:
    """Return the config lines of a download into `path`, from where an earlier try was cut."""
    if not os.path.exists(path):
        private_file(path)
    lines = [b"fail\nspeed-limit = 1\nspeed-time = 60\n", curl_line("output", path)]
    return [*lines, b'continue-at = "-"\n'] if os.path.getsize(path) else lines


def fetch(
    link: Link, path: str, job: Job, task: Task, with_key: bool
) -> tuple[CurlEnd, dict[str, str]]:
    """Run curl once for a link, going on where an earlier try was cut."""
    header_path, line_path = job.path("download-headers.txt"), job.path("download-curl.txt")
    if not os.path.exists(header_path):
        private_file(header_path)
    lines = [*connection_lines(task.settings, link.url, link.host), *resume_lines(path)]
    lines.append(curl_line("dump-header", header_path))
    lines.append(b"max-filesize = %d\n" % MAX_DOWNLOAD_BYTES)
    if link.address:
        pin = f"[{link.address}]" if ":" in link.address else link.address
        lines.append(curl_line("resolve", f"{link.host}:{link.port}:{pin}"))
    if with_key:
        lines += key_lines(task.settings)
    end = run_curl(b"".join(lines), line_path, task.session, Watch(path))
    if end.signal:
        raise Interrupted(end.signal)
    if os.path.getsize(path) > MAX_DOWNLOAD_BYTES:  # before 8.4 curl trusts Content-Length
        remove_file(path)
        raise link_failure(f"the picture is larger than {MAX_DOWNLOAD_BYTES // MEGABYTE} MB")
    return end, read_headers_file(header_path)


################################################################################
# Saving
################################################################################
# The one door through which pictures reach the disk: whole or not at all, never over another file.


def picture_pieces(source: ImageSource, answer: str, downloaded: str) -> Iterator[bytes]:
    """Yield a picture's bytes: a download's, or base64 in the file of the answer."""
    if source.kind in ("url", "raw"):
        with open(downloaded or answer, "rb") as file:
            yield from iter(lambda: file.read(WINDOW), b"")
    elif isinstance(source.value, Span):
        with open(answer, "rb") as file:
            yield from decode_text(span_pieces(file, source.value))
    else:
        yield from decode_text(iter([source.value.encode("utf-8", "replace")]))


def decode_text(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the bytes of base64 text, or of a data: URL that is percent-encoded (an SVG)."""
    from itertools import chain

    first = next(pieces, b"")
    prefix = DATA_PREFIX.match(first)
    if prefix and b";base64" not in prefix[0].lower():
        from urllib.parse import unquote_to_bytes  # 2 ms, which base64 does without

        yield unquote_to_bytes(first[prefix.end() :] + b"".join(pieces))
    else:
        yield from decode_base64(chain([first], pieces))


def write_picture(
    pieces: Iterable[bytes], folder: str, name: Callable[[str], str], force: bool, session: Session
) -> Picture:
    """Write one picture into a folder under `name(suffix)` and return it as it is on disk.

    Raises OSError where the folder can't take it, Failure where the bytes are no whole picture.
    """
    digest = None
    if session.digest:
        from hashlib import sha256

        digest = sha256()
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".{PROGRAM}-{session.part}{os.urandom(6).hex()}.part")
    flags = os.O_CREAT | os.O_EXCL | os.O_RDWR
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    try:
        with open(os.open(temporary, flags, 0o600), "w+b") as file:
            for piece in pieces:
                file.write(piece)
                if digest:
                    digest.update(piece)
            file.flush()
            os.fsync(file.fileno())  # the answer is removed after this: it must be on the disk
            size = file.seek(0, os.SEEK_END)
            info = inspect_picture(file)
        if not info or not info.whole:
            why = "is cut: its end is missing" if info else "is no picture"
            raise Failure(f"what came {why}", EXIT_UNSAVED, code="bad_image")
        open_to_others(temporary, session.mode)
        path = publish(temporary, name(FORMATS[info.format][0][0]), force)
    finally:
        remove_file(temporary)
    sync_folder(folder)
    sha = digest.hexdigest() if digest else ""
    return Picture(path, size, info.format, info.width, info.height, sha)


def open_to_others(path: str, mode: int) -> None:
    """Give a file the mode that the umask leaves; some file systems have no modes."""
    try:
        os.chmod(path, mode)
    except OSError:
        pass


def publish(temporary: str, path: str, force: bool) -> str:
    """Give a finished file its name and return it; a taken name is passed over, never replaced."""
    if force:
        os.replace(temporary, path)
        return path
    stem, suffix = os.path.splitext(path)
    for number in range(1, 10_000):
        free = path if number == 1 else f"{stem}-{number}{suffix}"
        try:
            os.link(temporary, free)
            return free
        except FileExistsError:
            if same_bytes(temporary, free):  # we were killed here before, and go on
                return free
            continue
        except (OSError, AttributeError, NotImplementedError):  # no hard links here
            try:
                private_file(free)
            except FileExistsError:
                if same_bytes(temporary, free):
                    return free
                continue
            os.replace(temporary, free)
            return free
    raise FileExistsError(f"no free name beside {path}")


def same_bytes(first: str, second: str) -> bool:
    """Return whether two files hold the same."""
    if not os.path.isfile(second) or os.path.getsize(first) != os.path.getsize(second):
        return False
    with open(first, "rb") as one, open(second, "rb") as other:
        return all(piece == other.read(WINDOW) for piece in iter(lambda: one.read(WINDOW), b""))


def sync_folder(folder: str) -> None:
    """Make a new name as lasting as its file, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    os.close(handle)


class Saving(NamedTuple):
    """What became of the pictures of one answer."""

    pictures: tuple[Picture, ...]
    problems: tuple[Failure, ...]
    fallbacks: int = 0  # saved in the job folder, as their own couldn't take them
    stopped: int = 0  # the signal that ended it early


def save_pictures(reply: Reply, job: Job, task: Task) -> Saving:
    """Save every picture of an answer, each reported at once; a bad one stops no other."""
    pictures: list[Picture] = []
    problems: list[Failure] = []
    fallbacks = 0
    for index, source in enumerate(reply.images):
        try:
            picture = save_picture(index, source, job, task)
        except Interrupted as stop:
            return Saving(tuple(pictures), tuple(problems), fallbacks, stop.number)
        except (Failure, OSError, ValueError) as error:
            problems.append(picture_problem(index, error))
            task.console.error(f"{task.console.name}: {problems[-1]}")
            continue
        fallbacks += os.path.dirname(picture.path) == job.folder
        pictures.append(picture)
        check_against_request(index, picture, task)
        task.console.saved(picture)
        if task.session.preview:
            preview(picture, task.console)
    return Saving(tuple(pictures), tuple(problems), fallbacks)


def picture_problem(index: int, error: Exception) -> Failure:
    """Return why one picture could not be saved."""
    why = os_reason(error) if isinstance(error, OSError) else str(error)
    code = error.code if isinstance(error, Failure) else "not_saved"
    code = "bad_image" if isinstance(error, ValueError) else code
    return Failure(f"picture {index + 1}: {why}", EXIT_UNSAVED, code=code)


def save_picture(index: int, source: ImageSource, job: Job, task: Task) -> Picture:
    """Save one picture where it was planned, else in the job folder, and say so."""
    target, session, downloaded = task.target, task.session, ""
    if source.kind == "url" and isinstance(source.value, str):
        downloaded = download(source.value, f"download-{index + 1}", job, task)

    def spare_name(suffix: str) -> str:
        return job.path(f"image-{index + 1}.{suffix}")

    def planned_name(suffix: str) -> str:
        return target.path(index, suffix)

    pieces = picture_pieces(source, job.path(job.answer), downloaded)
    if target.stdout and index == 0:
        picture = write_picture(pieces, job.folder, spare_name, True, session)
        return send_to_stdout(picture)._replace(revised_prompt=source.revised_prompt)
    try:
        picture = write_picture(pieces, target.folder, planned_name, target.force, session)
    except Failure:
        if downloaded:  # kept raw, under a name that no later fetch would go on from
            os.replace(downloaded, f"{downloaded}.raw")
        raise
    except OSError as error:
        where = f"{target.folder}: {os_reason(error)}"
        session.console.warn(f"cannot write in {where}; the picture is kept in {job.folder}")
        pieces = picture_pieces(source, job.path(job.answer), downloaded)
        picture = write_picture(pieces, job.folder, spare_name, True, session)
    return picture._replace(revised_prompt=source.revised_prompt)


def send_to_stdout(picture: Picture) -> Picture:
    """Copy a picture's bytes to standard output. Raises OSError where that is closed or full."""
    with open(picture.path, "rb") as file:
        for piece in iter(lambda: file.read(WINDOW), b""):
            if not write_stream(sys.stdout, piece):
                raise OSError("standard output is closed or full")
    os.unlink(picture.path)
    return picture._replace(path="-")


def check_against_request(index: int, picture: Picture, task: Task) -> None:
    """Warn where a picture is not what was asked for; it is kept all the same."""
    request, target, console = task.request, task.target, task.console
    got = (picture.width, picture.height)
    name = os.path.basename(picture.path)
    if request.pixels and got != request.pixels and picture.format != "svg":
        console.warn(f"{name} is {size_text(got)}, not {size_text(request.pixels)} as asked")
    suffix = os.path.splitext(target.name)[1].lstrip(".").lower()
    asked = SUFFIX_FORMATS.get(suffix) if suffix else request.get("output_format")
    if (asked or suffix) and asked != picture.format and not task.settings.sandbox:
        kept = "; its name is kept" if target.name else ""
        console.warn(f"{name} holds {picture.format}, not {asked or suffix} as asked{kept}")
    planned = target.path(index, FORMATS[picture.format][0][0])
    if os.path.dirname(picture.path) == os.path.dirname(planned) and picture.path != planned:
        console.warn(f"{os.path.basename(planned)} is there by now; the picture is {name}")


################################################################################
# Preview
################################################################################
# A saved picture in the terminal itself, by the protocol that the terminal speaks.

KITTY = "kitty"
# Variable, what it holds there, protocol: each terminal's own documents, 2026-11-21. The first row
# that fits counts, so that a terminal within another wins by what it sets itself.
TERMINALS = tuple(
    tuple(row)
    for row in table_rows("""
TERM_PROGRAM | WezTerm   | iterm2
TERM_PROGRAM | vscode    | iterm2
TERM_PROGRAM | iTerm.app | iterm2
TERM_PROGRAM | ghostty   | kitty
TERM         | xterm-kitty   | kitty
TERM         | xterm-ghostty | kitty
KITTY_WINDOW_ID |        | kitty
GHOSTTY_RESOURCES_DIR |  | kitty
KONSOLE_VERSION |        | kitty
LC_TERMINAL  | iTerm2    | iterm2
""")
)
NO_PREVIEW = "--preview needs a kitty, Ghostty, WezTerm, Konsole, iTerm2 or VS Code terminal"


def terminal_protocol(env: Mapping[str, str]) -> str:
    """Return the graphics protocol that the terminal speaks, or nothing."""
    for name, value, protocol in TERMINALS:
        if env.get(name) and value in ("", env[name]):
            return protocol
    return ""


def preview(picture: Picture, console: Console) -> None:
    """Show a saved picture on the terminal that stderr is, or say why not."""
    from shutil import get_terminal_size

    protocol = terminal_protocol(os.environ)
    if not protocol or not sys.stderr or not sys.stderr.isatty():
        console.warn(NO_PREVIEW)
        return
    if protocol == KITTY and picture.format != "png":
        console.warn("--preview: this terminal shows png only")
        return
    size = get_terminal_size()
    shape = picture.width / max(1, picture.height)
    columns = max(1, min(size.columns - 1, 60, round(2 * shape * (size.lines - 3))))
    rows = max(1, round(columns / shape / 2))  # a cell is about twice as high as wide
    tmux = bool(os.environ.get("TMUX"))
    pieces = kitty_pieces if protocol == KITTY else iterm_pieces
    try:
        with open(picture.path, "rb") as file:
            write_preview(pieces(file, picture.bytes, columns, rows, tmux), rows, tmux, console)
    except OSError as error:
        console.warn(f"--preview: {os_reason(error)}")


def write_preview(pieces: Iterable[bytes], rows: int, tmux: bool, console: Console) -> None:
    """Write the escape sequences; tmux passes them on, but doesn't know of the rows they take."""
    room = b"\n" * rows + b"\x1b[%dA" % rows if tmux else b""
    with console.lock:
        console.on_line()
        write_stream(sys.stderr, room)
        for piece in pieces:
            passed = b"\x1bPtmux;" + piece.replace(b"\x1b", b"\x1b\x1b") + b"\x1b\\"
            write_stream(sys.stderr, passed if tmux else piece)
        write_stream(sys.stderr, b"\x1b[%dB\r" % rows if tmux else b"\n")


def kitty_pieces(
    file: IO[bytes], size: int, columns: int, rows: int, tmux: bool
) -> Iterator[bytes]:
    """Yield kitty's sequences: a PNG as base64 in chunks of 4096, q=2 so that it answers nothing.

    Older ones (0.26) stretch a picture whose rows they aren't told. In tmux the cursor stays (C=1),
    as tmux would not know that it moved.
    """
    from binascii import b2a_base64

    lead = b"a=T,f=100,q=2,c=%d,r=%d,%s" % (columns, rows, b"C=1," if tmux else b"")
    for piece in iter(lambda: file.read(3072), b""):
        more = b"m=1" if file.tell() < size else b"m=0"
        yield b"\x1b_G" + lead + more + b";" + b2a_base64(piece, newline=False) + b"\x1b\\"
        lead = b""


def iterm_pieces(
    file: IO[bytes], size: int, columns: int, rows: int, tmux: bool
) -> Iterator[bytes]:
    """Yield iTerm2's sequences: one for the file, or many, as tmux takes no long one."""
    from binascii import b2a_base64

    told = b"inline=1;size=%d;width=%d;preserveAspectRatio=1" % (size, columns)
    yield b"\x1b]1337;" + (b"MultipartFile=" + told + b"\a" if tmux else b"File=" + told + b":")
    for piece in iter(lambda: file.read(3 * 4096), b""):
        text = b2a_base64(piece, newline=False)
        yield b"\x1b]1337;FilePart=" + text + b"\a" if tmux else text
    yield b"\x1b]1337;FileEnd\a" if tmux else b"\a"


################################################################################
# Cost
################################################################################
# What an answer cost, from its usage and the provider's prices; an estimate before it is sent.


class Tokens(NamedTuple):
    """The tokens of one answer, whichever names its usage had."""

    text_in: int = 0
    image_in: int = 0
    cached_in: int = 0
    out: int = 0
    total: int = 0


class Cost(NamedTuple):
    """An amount of money in a provider's own currency."""

    amount: float
    currency: str
    estimated: bool = False

    def __str__(self) -> str:
        mark = "about " if self.estimated else ""
        if self.currency == "USD":
            return f"{mark}${self.amount:.4f}"
        return f"{mark}{self.amount:{'.4g' if self.amount < 1 else '.0f'}} {self.currency}"


class Price(NamedTuple):
    """What a million tokens cost: text in and cached, image in and cached, image out."""

    text_in: float
    text_cached: float
    image_in: float
    image_cached: float
    out: float


# USD per million tokens by model family: OpenAI's pricing page, 2026-11-21.
PRICES = {
    "2": Price(5, 1.25, 8, 2, 30),
    "2.5": Price(5, 1.25, 8, 2, 30),
    "2.6": Price(5, 1.25, 8, 2, 30),
    "1.5": Price(5, 1.25, 8, 2, 32),
    "1-mini": Price(2, 0.20, 2.50, 0.25, 8),
    "1": Price(5, 1.25, 10, 2.50, 40),
}
# OpenAI-HK's formula: (text in * 5 + image in * 10 + out * 40) * 7.1 * 10000 / 1,000,000 credits.
HK_PRICE = Price(*(dollars * 71_000 for dollars in (5, 5, 10, 10, 40)))
PARTIAL_TOKENS = 100  # each partial image (SDK)
# Output tokens of the 1.x models (square, portrait, landscape) by quality: the guide.
OLD_TOKENS = {"low": (272, 408, 400), "medium": (1056, 1584, 1568), "high": (4160, 6240, 6208)}


def count(value: Any, *names: str) -> int:
    """Return the first positive whole number under one of the names of a usage object."""
    for name in names:
        found = value.get(name) if isinstance(value, dict) else None
        if isinstance(found, (int, float)) and 0 < found < 10**12:
            return int(found)
    return 0


def read_usage(usage: dict[str, Any] | None) -> Tokens | None:
    """Return the tokens of a usage object, OpenAI's names first, then NodeKey's; None for none."""
    if not usage:
        return None
    details = usage.get("input_tokens_details") or usage.get("prompt_tokens_details") or {}
    if not count(usage, "input_tokens") and usage.get("prompt_tokens_details"):
        details = usage["prompt_tokens_details"]
    total_in = count(usage, "input_tokens", "prompt_tokens")
    image_in = min(count(details, "image_tokens"), total_in)
    out = count(usage, "output_tokens", "completion_tokens")
    total = count(usage, "total_tokens") or total_in + out
    cached = min(count(details, "cached_tokens"), total_in)
    return Tokens(total_in - image_in, image_in, cached, out, total) if total else None


def price_of(model: str, settings: Settings) -> tuple[Price, str] | None:
    """Return the price of a model's tokens and its currency, the config's `prices` first."""
    own = settings.prices or {}
    row = own.get(model) if isinstance(own.get(model), dict) else own
    if isinstance(row, dict) and row.get("out") is not None:
        text_in, image_in = float(row.get("text_in", 0)), float(row.get("image_in", 0))
        cached = (row.get("text_cached", text_in), row.get("image_cached", image_in))
        price = Price(text_in, float(cached[0]), image_in, float(cached[1]), float(row["out"]))
        return price, str(row.get("currency", own.get("currency", "USD")))
    if settings.provider.name == "openai-hk":
        return HK_PRICE, settings.provider.currency
    known = MODELS.get(model)
    if settings.provider.name == "openai" and known and known.family in PRICES:
        return PRICES[known.family], settings.provider.currency
    return None


def token_cost(tokens: Tokens, price: Price) -> float:
    """Return what tokens cost; cached ones are counted as text first."""
    text_cached = min(tokens.cached_in, tokens.text_in)
    image_cached = min(tokens.cached_in - text_cached, tokens.image_in)
    amounts = (
        (tokens.text_in - text_cached) * price.text_in,
        text_cached * price.text_cached,
        (tokens.image_in - image_cached) * price.image_in,
        image_cached * price.image_cached,
        tokens.out * price.out,
    )
    return sum(amounts) / 1_000_000


def output_tokens(request: Request) -> int | None:
    """Return an estimate of one picture's output tokens; auto quality counts as high.

    The formula is an inference that fits all nine published points of gpt-image-2.
    """
    from math import ceil

    model = MODELS.get(str(request.get("model")))
    quality = request.get("quality", "auto")
    quality = "high" if quality in ("auto", "xhigh", "max") else quality
    width, height = request.pixels or (1024, 1024)
    base = {"low": 16, "medium": 48, "high": 96}.get(str(quality))
    if not model or not base:
        return None
    if model.family in ("1", "1.5", "1-mini"):
        return OLD_TOKENS[str(quality)][0 if width == height else 1 if height > width else 2]
    side = round(base * min(width, height) / max(width, height))
    return ceil(base * side * (2_000_000 + width * height) / 4_000_000)


def estimate_cost(request: Request, settings: Settings) -> Cost | None:
    """Return what a request may cost, marked as an estimate; None where no price is known."""
    known = price_of(str(request.get("model")), settings)
    out = output_tokens(request)
    if not known or not out or settings.sandbox:
        return None
    partials = request.get("partial_images", 0) if request.get("stream") else 0
    partials = partials if isinstance(partials, int) else 0
    text_in = len(str(request.get("prompt"))) // 4 + 1
    each = Tokens(text_in, 0, 0, out + PARTIAL_TOKENS * partials)
    return Cost(token_cost(each, known[0]) * request.total * settings.discount, known[1], True)


################################################################################
# One request
################################################################################
# The middle of the pipeline, shared by all commands: job folder, curl, verdict, saving, clean-up.


class Answer(NamedTuple):
    """What the last attempt brought."""

    verdict: Verdict
    reply: Reply
    end: CurlEnd
    headers: dict[str, str]
    attempts: int
    partials: tuple[Picture, ...] = ()

    @property
    def request_id(self) -> str | None:
        """The id that the server gave the request."""
        return printable(self.headers.get("x-request-id", ""), 200) or None


class Outcome(NamedTuple):
    """What one request came to, for the terminal, the JSON document and the exit code."""

    command: str
    request: Request | None = None
    pictures: tuple[Picture, ...] = ()
    failure: Failure | None = None
    answer: Answer | None = None
    job_id: str | None = None
    recover_id: str | None = None
    resumed: bool = False
    sandbox: bool = False
    cost: Cost | None = None


class StreamWatch(Watch):
    """Saves the partial images of an event stream as they come, flat in memory."""

    tick = 0.5

    def __init__(self, job: Job, task: Task) -> None:
        super().__init__(job.path(ANSWER))
        self.target, self.session = task.target, task.session
        self.partials: list[Picture] = []
        self.finished = 0  # pictures completed so far: the next partial is of the one after
        self.position = 0
        self.skeleton: Skeleton | None = None
        self.idle = False  # the server ignores `stream`, or its stream can't be read

    def look(self) -> int:
        """Take in what has come since the last look; return how many bytes there are."""
        size = super().look()
        try:
            with open(self.path, "rb") as file:
                file.seek(self.position)
                for window in iter(lambda: file.read(WINDOW), b""):
                    self.take(window)
        except (OSError, ValueError):
            self.idle = True
        return size

    def take(self, window: bytes) -> None:
        """Take in the next bytes, and save what partial images they end."""
        start = window.lstrip(b"\xef\xbb\xbf \t\r\n")
        if not self.skeleton and len(start) < 8 and b":" not in start:
            return  # too little to tell what it is; the next look begins here again
        if not self.skeleton and answer_kind(start) == "events":
            self.skeleton = Skeleton(True)
            self.skeleton.offset = self.position
        self.idle = self.idle or not self.skeleton
        self.position += len(window)
        if not self.skeleton or self.idle:
            return
        self.skeleton.feed(window)
        text = self.skeleton.text
        end = max(text.rfind(b"\n\n"), text.rfind(b"\n\r\n"))
        if end >= 0:
            complete = bytes(text[:end]).decode("utf-8", "replace")
            del text[:end]
            for event in parse_events(complete):
                self.take_event(event)

    def take_event(self, event: Any) -> None:
        """Save one partial image; count the pictures that are complete."""
        kind = str(event.get("type")) if isinstance(event, dict) else ""
        self.finished += kind.endswith(".completed")
        assert self.skeleton, "events come through it"
        source = image_source(event, self.skeleton) if "partial_image" in kind else None
        if not source or source.kind == "url" or self.target.stdout:
            return
        number = count(event, "partial_image_index") + 1
        try:
            self.save(source, number)
        except (OSError, ValueError, Failure) as error:
            self.session.console.warn(f"partial image {number} could not be saved: {error}")

    def save(self, source: ImageSource, number: int) -> None:
        """Write one partial image beside the place of its picture."""

        def name(suffix: str) -> str:
            stem, dot_suffix = os.path.splitext(self.target.path(self.finished, suffix))
            return f"{stem}.partial-{number}{dot_suffix}"

        pieces = picture_pieces(source, self.path, "")
        folder, force = self.target.folder, self.target.force
        picture = write_picture(pieces, folder, name, force, self.session)
        self.partials.append(picture)
        self.session.console.say(f"Partial: {picture.path}")


def make_watch(job: Job, task: Task) -> Watch:
    """Return what looks at the answer of a request as it comes."""
    request = task.request
    watch = StreamWatch(job, task) if request.get("stream") else Watch(job.path(ANSWER))
    usual = USUAL_TIMES.get(str(request.get("quality", "auto")), "")
    watch.usual = USUAL_TIMES.get(str(request.get("model")), usual)
    return watch


def perform(task: Task) -> Outcome:
    """Send a checked request, or finish the one under way, and save what comes."""
    find_curl()
    job = None
    if task.session.new:
        set_aside_jobs(task)
    elif not task.settings.sandbox:
        job = adopt_job(task)
    if job:
        task.console.say(f"resumed: job {job.id} already has this request; --new sends another")
    else:
        job = create_job(task)
        shown = [task.request.get(name) for name in ("model", "size", "quality")]
        url = f"{task.settings.base.url}/images/{task.request.endpoint}"
        task.console.say(" ".join(["POST", url, *(str(word) for word in shown if word)]))
    return carry_out(job, task)


def carry_out(job: Job, task: Task) -> Outcome:
    """Bring a job, new or resumed, to its end."""
    request, sandbox = task.request, task.settings.sandbox
    task.console.say(f"Job: {job.id}")
    outcome = Outcome(request.command, request, resumed=job.resumed, sandbox=sandbox)
    try:
        job, answer = deliver(job, task)
    except Interrupted as stop:
        detached = task.session.keeper.detached
        failure = stopped(stop.number, bool(job.answer_size()), detached=detached)
        return settle(job, outcome._replace(failure=failure), task)
    return finish_job(job, outcome._replace(answer=answer), task)


def finish_job(job: Job, outcome: Outcome, task: Task) -> Outcome:
    """Save what an answer holds, put it on record, and let the job go if nothing is left in it."""
    outcome = outcome._replace(job_id=job.id)
    try:
        outcome = save_answer(outcome, job, task)
        keep_record(outcome, task)
    except Interrupted as stop:
        outcome = outcome._replace(failure=stopped(stop.number, True))
    except OSError as error:
        failure = Failure(f"job {job.id}: {os_reason(error)}", EXIT_UNKNOWN, maybe_billed=True)
        outcome = outcome._replace(failure=failure)
    return settle(job, outcome, task)


def answer_cost(answer: Answer, request: Request, settings: Settings) -> Cost | None:
    """Return what an answer cost, or None where no price is known."""
    if settings.sandbox:
        return None
    tokens = read_usage(answer.reply.usage)
    known = price_of(str(request.get("model")), settings)
    header = answer.headers.get("x-litellm-response-cost", "")
    if not settings.prices and re.fullmatch(r"[0-9]+(\.[0-9]+)?(e-?[0-9]+)?", header):
        return Cost(float(header), "USD")
    if not tokens or not known or not (tokens.text_in or tokens.image_in or tokens.out):
        return None
    return Cost(token_cost(tokens, known[0]) * settings.discount, known[1])


def keep_record(outcome: Outcome, task: Task) -> None:
    """Write the sidecars and the history line of what was served, before its job goes."""
    answer, request, settings = outcome.answer, task.request, task.settings
    if not answer or answer.verdict.kind in ("refused", "unsent"):
        return
    entry = {
        "time": utc_text(),
        "command": request.command,
        "host": settings.base.host,
        **{name: request.get(name) for name in ("model", "size", "quality", "prompt")},
        "paths": [picture.path for picture in outcome.pictures],
        "usage": answer.reply.usage,
        "cost": outcome.cost._asdict() if outcome.cost else None,
        "request_id": answer.request_id,
        "seconds": round(answer.end.seconds, 2),
        "job_id": outcome.job_id,
        "outcome": answer.verdict.kind,
        **({"price": "batch"} if settings.discount < 1 else {}),
    }
    if task.session.sidecar:
        write_sidecars(outcome.pictures, {**entry, "request": payload(request)}, task)
    if settings.history and not settings.sandbox:
        append_history(entry, task.console)


def write_sidecars(pictures: Sequence[Picture], entry: dict[str, Any], task: Task) -> None:
    """Write PICTURE.json beside each picture; a fault is a warning, as the picture is there."""
    console = task.console
    for picture in pictures:
        text = json.dumps({**entry, "picture": picture._asdict()}, indent=1)
        temporary = f"{picture.path}.{os.urandom(4).hex()}.part"
        try:
            private_file(temporary, console.scrub(text).encode("ascii"))
            open_to_others(temporary, task.session.mode)
            path = publish(temporary, f"{picture.path}.json", task.target.force)
            if path != f"{picture.path}.json":
                console.warn(f"{picture.path}.json appeared meanwhile; wrote {path}")
        except OSError as error:
            console.warn(f"cannot write {picture.path}.json: {os_reason(error)}")
        finally:
            remove_file(temporary)


def append_history(entry: dict[str, Any], console: Console) -> None:
    """Append one line to the history, in one write, so that many processes can do so at once."""
    path = os.path.join(state_root(), HISTORY)
    line = console.scrub(json.dumps(entry, ensure_ascii=True)) + "\n"
    try:
        with open_lines(path) as file:
            write_line(file, line)
    except OSError as error:
        console.warn(f"cannot write {path}: {os_reason(error)}")


def stopped(number: int, answered: bool, unsent: bool = False, detached: bool = False) -> Failure:
    """Return the failure of a call that a signal ended."""
    from signal import Signals as Names

    why = "part of the answer is kept" if answered else "no answer had come"
    billed = "nothing was sent" if unsent else f"{why}; the request may have been billed"
    if detached and not unsent:
        billed = "its request goes on; the same command picks the answer up"
    name = Names(number).name
    return Failure(
        f"stopped by {name}: {billed}", 128 + number, code="interrupted", maybe_billed=not unsent
    )


def deliver(job: Job, task: Task) -> tuple[Job, Answer]:
    """Send until there is a verdict that another try can't better; return the job and it.

    Only what was certainly not served is sent again, unless --retry-unsafe; then the earlier
    answer keeps its own job folder.
    """
    attempt, job_now, settings, console = 1, job, task.settings, task.console
    while True:
        watch = make_watch(job_now, task)
        try:
            if attempt == 1 and job.resumed:
                end = await_curl(job_now, watch, console)
            else:
                end = post(job_now, watch, task)
        except Failure as unsent:
            return job_now, Answer(Verdict("unsent", unsent), Reply("empty"), CurlEnd(None), {}, 0)
        watch.look()
        answer = read_answer(job_now, end, task, attempt)
        if isinstance(watch, StreamWatch):
            answer = answer._replace(partials=tuple(watch.partials))
        verdict = answer.verdict
        if answer.end.status:
            console.say(f"HTTP {end.status} in {end.seconds:.1f} s")
        unsafe = task.session.retry_unsafe and verdict.kind == "unknown"
        if end.signal or attempt > settings.retries or not (verdict.retry or unsafe):
            return job_now, answer
        if verdict.wait is not None and verdict.wait > task.session.keeper.patience:
            return job_now, answer._replace(verdict=too_long(verdict))
        delay = retry_delay(attempt, verdict.wait)
        left = f"{attempt} of {settings.retries}"
        console.say(f"{verdict.failure}; trying again in {delay:.1f} s ({left})")
        try:
            task.session.keeper.pause(delay)
        except Interrupted as stop:
            failure = stopped(stop.number, False, unsent=not unsafe)
            return job_now, answer._replace(verdict=verdict._replace(failure=failure))
        attempt += 1
        if unsafe:
            try:
                spare = create_job(task)
            except Failure:
                return job_now, answer
            let_go(job_now, Outcome(task.request.command, task.request), task)
            job_now = spare


def post(job: Job, watch: Watch, task: Task) -> CurlEnd:
    """Run curl for the paid POST. Raises Failure where nothing could be sent."""
    config = post_config(job, task)
    task.session.keeper.enter()
    for name in (ANSWER, CURL_LINE):  # curl does so with the first byte only
        os.truncate(job.path(name), 0)
    with open(job.path(HEADERS), "wb") as file:
        file.write(UNTOUCHED)
    task.session.keeper.sending(job)
    if SIGNALS.number:
        raise stopped(SIGNALS.number, False, unsent=True)
    SIGNALS.sent = True
    return run_curl(config, job.path(CURL_LINE), task.session, watch)


def too_long(verdict: Verdict) -> Verdict:
    """Return the verdict for a server that asks for more patience than we have."""
    failure = verdict.failure
    assert failure and verdict.wait is not None
    failure.hint = f"the server asks to wait {verdict.wait:.0f} s; run it again after that"
    return verdict._replace(retry=False)


def await_curl(job: Job, watch: Watch, console: Console) -> CurlEnd:
    """Wait for the curl of a job whose script is gone, and return how it ended."""
    progress = Progress(console, watch.usual)
    started = time.monotonic()
    try:
        while curl_lives(job):
            SIGNALS.pause(0.1)  # a lock can't be waited for with a limit
            progress.tick(watch.look())
    finally:
        progress.stop()
    status, sent = read_curl_line(job.path(CURL_LINE))
    sent = 0 if job.untouched else sent
    return CurlEnd(None, status, sent, "", time.monotonic() - started)


def read_answer(
    job: Job, end: CurlEnd, task: Task, attempts: int = 1, salvage: bool = False
) -> Answer:
    """Read what an attempt left in the job folder and judge it."""
    console, headers = task.console, read_headers_file(job.path(HEADERS))
    reply = read_reply(job.path(ANSWER), salvage)
    reply = reply._replace(excerpt=console.scrub(reply.excerpt)[:200])
    if reply.error:
        parts = (console.scrub(part) for part in reply.error)
        reply = reply._replace(error=ApiError(*(printable(part, 600) for part in parts)))
    return Answer(judge(end, headers, reply, task.settings), reply, end, headers, attempts)


def save_answer(outcome: Outcome, job: Job, task: Task) -> Outcome:
    """Save the pictures of an answer, if it has some, and say what came of it."""
    answer = outcome.answer
    assert answer, "deliver comes first"
    outcome = outcome._replace(cost=answer_cost(answer, task.request, task.settings))
    if answer.verdict.failure and not answer.reply.images:
        failure = answer.verdict.failure
        sent = answer.verdict.kind == "unknown"
        if answer.end.signal and (sent or answer.verdict.retry):
            detached = task.session.keeper.detached
            failure = stopped(answer.end.signal, bool(job.answer_size()), not sent, detached)
        return outcome._replace(failure=failure)
    saving = save_pictures(answer.reply, job, task)
    lacking = saving_failure(saving, task.request.total)
    return outcome._replace(pictures=saving.pictures, failure=lacking)


def saving_failure(saving: Saving, asked: int) -> Failure | None:
    """Return the failure where not every picture is saved where it was asked for."""
    if saving.stopped:
        return stopped(saving.stopped, True)
    came = len(saving.pictures) + len(saving.problems)
    if not saving.pictures:
        return Failure(f"none of {came} pictures could be saved; the answer is kept", EXIT_UNSAVED)
    if saving.problems:
        return Failure(f"{len(saving.pictures)} of {came} pictures saved", EXIT_PARTIAL)
    if saving.fallbacks:
        return Failure("pictures are in the job folder, not where they were to go", EXIT_PARTIAL)
    if came < asked:
        return Failure(f"{came} of the {asked} pictures asked for came", EXIT_PARTIAL)
    return None


def settle(job: Job, outcome: Outcome, task: Task) -> Outcome:
    """End a job: its outcome is put on record before its folder may go."""
    outcome = outcome._replace(job_id=job.id)
    task.session.keeper.done(job, outcome)
    return let_go(job, outcome, task)


def let_go(job: Job, outcome: Outcome, task: Task) -> Outcome:
    """Remove a job that has nothing left to give; keep any other, without the key."""
    failure, answer = outcome.failure, outcome.answer
    all_saved = bool(outcome.pictures) and not any(
        os.path.dirname(picture.path) == job.folder for picture in outcome.pictures
    )
    came = len(answer.reply.images) if answer else 0
    whole = bool(answer and answer.reply.whole) or not failure
    done = all_saved and len(outcome.pictures) >= came and whole
    served = not (answer and answer.verdict.kind in ("refused", "unsent"))
    if done or not served:
        remove_job(job)
        return outcome
    blank_secrets(job, task.console)
    set_status(job, "kept" if came else "unknown")
    alive = bool(job.answer_size()) or curl_lives(job)
    job.lock.close()
    if failure and outcome.resumed and not outcome.pictures:
        failure.hint = task.session.keeper.again
    return outcome._replace(recover_id=job.id if alive else None)


################################################################################
# Reports
################################################################################
# From an Outcome to lines on stderr, one JSON document on stdout, and the exit code.


def recover_command(job_id: str) -> str:
    """Return the command line that brings out a job's pictures, runnable as it stands."""
    words = [sys.executable or "python3", os.path.abspath(__file__), "recover", job_id]
    if os.name == "nt":
        from subprocess import list2cmdline

        return list2cmdline(words)
    return " ".join(quoted(word) for word in words)


def report(outcome: Outcome, console: Console) -> int:
    """Print what an outcome came to and return the exit code."""
    failure = outcome.failure
    tokens = read_usage(outcome.answer.reply.usage) if outcome.answer else None
    words = [f"{tokens.total} tokens"] if tokens else []
    words += [str(outcome.cost)] if outcome.cost else []
    if outcome.pictures and words:
        console.say(", ".join(words))
    if console.json:
        console.document(outcome_document(outcome, console))
    if failure:
        console.error(f"{console.name}: {failure}")
    again = outcome.command != "recover" or bool(failure and failure.code == "interrupted")
    if outcome.recover_id and again:  # a recover that found nothing finds nothing next time
        console.error(f"Recover: {recover_command(outcome.recover_id)}")
    return failure.exit_code if failure else EXIT_OK


def base_document(command: str, failure: Failure | None, console: Console) -> dict[str, Any]:
    """Return the JSON document that every command's begins with."""
    return {
        "schema": 1,
        "ok": failure is None,
        "command": command,
        "warnings": console.warnings,
        "error": failure_document(failure, console) if failure else None,
    }


def failure_document(failure: Failure, console: Console) -> dict[str, Any]:
    """Return the `error` object of the JSON document."""
    return {
        "code": failure.code,
        "message": printable(console.scrub(failure.message)),
        "hint": printable(console.scrub(failure.hint)),
        "http_status": failure.http_status,
        "exit_code": failure.exit_code,
        "maybe_billed": failure.maybe_billed,
    }


def outcome_document(outcome: Outcome, console: Console) -> dict[str, Any]:
    """Return the one JSON document of a request."""
    answer, request, cost = outcome.answer, outcome.request, outcome.cost
    usage = answer.reply.usage if answer else None
    return {
        **base_document(outcome.command, outcome.failure, console),
        "model": request.get("model") if request else None,
        "images": [picture._asdict() for picture in outcome.pictures],
        "partials": [picture._asdict() for picture in answer.partials] if answer else [],
        "usage": usage,
        "cost": cost._asdict() if cost else None,
        "elapsed_s": round(answer.end.seconds, 2) if answer else None,
        "http_status": answer.end.status or None if answer else None,
        "request_id": answer.request_id if answer else None,
        "attempts": answer.attempts if answer else 0,
        "job_id": outcome.job_id,
        "recover_id": outcome.recover_id,
        "resumed": outcome.resumed,
        "sandbox": outcome.sandbox,
    }


def masked(key: str | None) -> str:
    """Return what may be shown of a key: its last four characters, if it is long enough."""
    if not key:
        return "none"
    return f"{key[:3]}…{key[-4:]}" if len(key) >= 20 else "****"


def masked_headers(headers: dict[str, str]) -> dict[str, str]:
    """Return extra headers as they may be shown."""
    return {name: "****" if SECRET_NAMES.search(name) else headers[name] for name in headers}


def dry_run_document(task: Task) -> dict[str, Any]:
    """Return what would be sent, from the same values; the key masked, nothing made."""
    request, target, settings = task[:3]
    estimate = estimate_cost(request, settings)
    name = settings.auth_header.partition(":")[0]
    parts = form_files(request, settings.image_field)
    suffix = FORMATS.get(str(request.get("output_format")), FORMATS["png"])[0][0]
    paths = ["-"] if target.stdout else [target.path(i, suffix) for i in range(target.planned)]
    return {
        "endpoint": f"{settings.base.url}/images/{request.endpoint}",
        "fields": payload(request),
        "files": [
            {"field": part[0], "path": part[1] or None, "media_type": part[2], "bytes": file.size}
            for part, file in zip(parts, request.files)
        ],
        "headers": {
            **masked_headers(dict(settings.headers)),
            **({name: masked(settings.key)} if settings.key else {}),
        },
        "key_source": settings.key_source if settings.key else None,
        "paths": paths,
        "estimate": estimate._asdict() if estimate else None,
    }


KEY_MARK = "THE-KEY-GOES-HERE"


def pasteable_command(request: Request, settings: Settings) -> str:
    """Return the request as a curl command for a shell, the key as $GPT_IMAGE2_API_KEY."""
    from base64 import b64encode

    if settings.key or not settings.base.loopback:
        settings = settings._replace(key=KEY_MARK)
    lines, feed = request_lines(request, settings, ""), ""
    if request.endpoint == "generations":
        words = [("data-binary", json_body(request))]
    else:
        words = [("form-string", f"{name}={text}") for name, text in form_fields(request)]
        parts = form_files(request, settings.image_field)
        lines += [
            form_file_line(name, path or "-", file, media) for name, path, media, file in parts
        ]
        drawn = [file.data for file in request.files if file.data]
        feed = f"printf %s {b64encode(drawn[0]).decode()} | base64 -d | " if drawn else ""
    for line in b"".join(lines).decode("utf-8", "surrogateescape").splitlines():
        option, _, value = line.partition(" = ")
        value = re.sub(r"\\(.)", r"\1", value[1:-1]) if value.startswith('"') else value
        words.append((option, value))
    shown = [f"--{option} {quoted(value)}" if value else f"--{option}" for option, value in words]
    command = " \\\n  ".join(word for word in shown if not word.startswith("--write-out"))
    command = re.sub(f"'([^']*){KEY_MARK}'", r'"\1$GPT_IMAGE2_API_KEY"', command)
    return f"{feed}curl -q \\\n  {command}"


def show_dry_run(task: Task) -> int:
    """Print what would be sent and where the pictures would go; create nothing."""
    document, console, command = dry_run_document(task), task.console, task.request.command
    if console.verbose:
        document["curl"] = pasteable_command(task.request, task.settings)
    if console.json:
        return emit_document(command, {"dry_run": document}, console)
    console.emit(f"POST {document['endpoint']}")
    for name, text in document["headers"].items():
        console.emit(f"  {name}: {text}")
    for line in json.dumps(document["fields"], indent=2, ensure_ascii=False).splitlines():
        console.emit(UNPRINTABLE.sub(" ", line))
    for file in document["files"]:
        where = file["path"] or "drawn by --mask-box"
        console.emit(f"  {file['field']}: {where} ({file['media_type']}, {file['bytes']} bytes)")
    for path in document["paths"]:
        console.emit(f"would save: {path}")
    estimate = estimate_cost(task.request, task.settings)
    console.emit(f"estimate: {estimate or 'no price is known here'}")
    if console.verbose:
        console.emit(document["curl"])
    return EXIT_OK


################################################################################
# Jobs files
################################################################################
# From a file of jobs to what each line asks for. Reads the file once; sends nothing.

LINE_KEYS = (
    *("id", "prompt", "prompt_file", "images", "image", "mask", "mask_box", "markup"),
    *("params", "param", "nearest_size", "output"),
)
FIELD_KEYS = {key: field for field in FIELDS for key in (field.dest, field.name)}
MAX_LINE_BYTES = MEGABYTE
WINDOWS_DEVICES = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\.|$)", re.I)


class JobsFile:
    """The jobs of a file, copied to a file without a name, so that only offsets are in memory."""

    def __init__(self) -> None:
        from tempfile import gettempdir

        self.spool = unnamed_file(gettempdir())
        self.rows: list[tuple[int, int]] = []  # number of the line or element, offset
        self.faults: list[tuple[int, str]] = []  # number, what is wrong with it
        self.word = "line"
        self.plain = False  # nothing but prompts, whatever they look like
        self.lock = allocate_lock()

    def add(self, number: int, text: bytes) -> None:
        """Take in one job as a line of JSON."""
        self.rows.append((number, self.spool.tell()))
        self.spool.write(text + b"\n")

    def place(self, row: int) -> str:
        """Return where a job stands in the file, as messages name it: `line 3`."""
        return f"{self.word} {self.rows[row][0]}"

    def read(self, row: int) -> dict[str, Any]:
        """Return what a job's line holds. Raises Failure for one that is no JSON object."""
        with self.lock:
            self.spool.seek(self.rows[row][1])
            text = self.spool.readline()
        try:
            value = json.loads(text, object_pairs_hook=no_twins, parse_constant=no_constant)
        except (ValueError, RecursionError) as error:
            raise Failure(f"it is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise Failure('it is not an object like {"prompt": "a fox"}')
        return value


def no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; one with a key twice is refused, as nobody knows which is meant."""
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twin = next(name for name in names if names.count(name) > 1)
        raise Failure(f"{printable(twin, 60)!r} stands twice in one object")
    return value


def no_constant(name: str) -> Any:
    """Refuse NaN and Infinity, which Python writes and JSON does not have."""
    raise ValueError(f"{name} is no JSON value")


def read_jobs_file(path: str) -> JobsFile:
    """Return the jobs of a JSONL file, a JSON array, or a text with a prompt a line."""
    jobs = JobsFile()
    try:
        if path == "-":
            take_jobs(sys.stdin.buffer, path, jobs)
        else:
            with open(path, "rb") as file:
                take_jobs(file, path, jobs)
    except (OSError, AttributeError) as error:
        why = os_reason(error) if isinstance(error, OSError) else "standard input is closed"
        raise Failure(f"cannot read the jobs file {path}: {why}") from None
    if not jobs.rows and not jobs.faults:
        raise Failure(f"there is no job in {'standard input' if path == '-' else path}")
    return jobs


def take_jobs(file: IO[bytes], path: str, jobs: JobsFile) -> None:
    """Copy the jobs out of an open file: `.txt` is text, else the first character decides."""

    def next_line() -> bytes:
        with SIGNALS:
            return file.readline(MAX_LINE_BYTES + 1)

    number, line = 1, next_line()
    line = line[3:] if line.startswith(b"\xef\xbb\xbf") else line
    while line and not line.strip():
        number, line = number + 1, next_line()
    first = line.lstrip()[:1]
    if first == b"[" and not path.lower().endswith(".txt"):
        take_array(line + file.read(), jobs)
        return
    suffix = os.path.splitext(path)[1].lower()
    text = suffix == ".txt" or (first != b"{" and suffix not in (".jsonl", ".ndjson", ".json"))
    jobs.plain = suffix == ".txt"
    while line:
        take_line(number, line.strip(), text, jobs)
        while len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
            line = next_line()  # the rest of one that is too long
        number, line = number + 1, next_line()


def take_line(number: int, line: bytes, text: bool, jobs: JobsFile) -> None:
    """Take in one line: JSON, or a prompt; a blank one is none."""
    if len(line) >= MAX_LINE_BYTES:
        jobs.faults.append((number, f"it is longer than {MAX_LINE_BYTES} bytes"))
    elif text and line:
        if line[:1] == b"{" and not jobs.plain:
            jobs.faults.append((number, "it looks like JSON among prompts (name the file .txt)"))
            return
        try:
            jobs.add(number, json.dumps({"prompt": line.decode("utf-8")}).encode("ascii"))
        except UnicodeDecodeError:
            jobs.faults.append((number, "it is not UTF-8"))
    elif line:
        jobs.add(number, line)


def take_array(data: bytes, jobs: JobsFile) -> None:
    """Take in the elements of one JSON array."""
    try:
        elements = json.loads(data.decode("utf-8"), object_pairs_hook=no_twins)
    except (ValueError, RecursionError) as error:
        raise Failure(f"the jobs file is no JSON array: {error}") from None
    jobs.word = "item"
    for number, element in enumerate(elements, 1):
        jobs.add(number, json.dumps(element).encode("ascii"))


def ask_from_line(line: dict[str, Any], defaults: dict[str, Any], args: Args) -> Ask:
    """Return what one line asks for, the command line's options filling what it leaves open."""
    images = line_images(line)
    command = "edit" if images else "generate"
    options = {**defaults, **suffix_option(args, line_path(line, "output"))}
    if command == "generate":
        options.pop("input_fidelity", None)
    for key, value in line.items():
        field = FIELD_KEYS.get(key)
        if not field and key not in LINE_KEYS:
            close = nearest(key, [*LINE_KEYS, *FIELD_KEYS])
            raise Failure(f"{printable(key, 60)!r} is not an option{close}")
        if field and value is not None:
            if command[0] not in field.endpoints:
                raise Failure(f"{key} is for lines with images")
            options[field.name] = read_value(key, read_field, field, value)
    mask, markup = line_path(line, "mask"), line_path(line, "markup")
    box = read_value("mask_box", line_box, line.get("mask_box"))
    if not images and (mask or markup or box):
        raise Failure("mask, mask_box and markup need images")
    params = (*(args.param or ()), *line_params(line))
    take_nearest = bool(args.nearest_size or line.get("nearest_size"))
    prompt = line_prompt(line)
    return Ask(command, prompt, options, params, images, mask, box, markup, take_nearest)


def read_value(key: str, read: Callable[..., Any], *values: Any) -> Any:
    """Return what a reader makes of a line's value; its complaint becomes a Failure."""
    try:
        return read(*values)
    except (ValueError, TypeError) as error:
        raise Failure(f"{key}: {printable(str(error), 300)}") from None


def line_path(line: dict[str, Any], key: str) -> str | None:
    """Return a path of a line, or None where it has none; no shell has seen its ~."""
    value = line.get(key)
    if value is None or (isinstance(value, str) and value):
        return value and os.path.expanduser(value)
    raise Failure(f"{key} is not a text")


def line_prompt(line: dict[str, Any]) -> str:
    """Return a line's prompt, from one of its two places."""
    prompt, path = line.get("prompt"), line_path(line, "prompt_file")
    if (prompt is None) == (path is None):
        raise Failure("it has no prompt" if path is None else "pass prompt or prompt_file")
    if path is not None:
        return read_prompt_file(path)
    if not isinstance(prompt, str):
        raise Failure("prompt is not a text")
    return prompt


def line_images(line: dict[str, Any]) -> tuple[str, ...]:
    """Return the input pictures of a line; a single one may stand without a list."""
    found: list[Any] = []
    for key in ("images", "image"):
        value = line.get(key)
        found += value if isinstance(value, list) else [value] if value is not None else []
    if not all(isinstance(name, str) and name for name in found):
        raise Failure("images is not a list of files")
    if not found and ("images" in line or "image" in line):
        raise Failure("images is empty, so it is no edit; leave it out to generate")
    return tuple(map(os.path.expanduser, found))


def line_box(value: Any) -> tuple[int, int, int, int] | None:
    """Return a line's mask_box, as text or as a list of four numbers."""
    if value is None:
        return None
    return read_mask_box(",".join(map(str, value)) if isinstance(value, list) else str(value))


def line_params(line: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return a line's fields that no option knows."""
    value = line.get("params", line.get("param")) or {}
    if not isinstance(value, dict):
        raise Failure("params is not an object")
    for name in value:
        read_value("params", read_param, f"{name}=")
    return list(value.items())


def line_id(line: dict[str, Any]) -> str:
    """Return a line's own id, which names its pictures, or nothing."""
    value = line.get("id")
    text = "" if value is None else str(value)
    fits = re.fullmatch(r"[^\s./\\:*?\"<>|]([^/\\:*?\"<>|]{0,98}[^\s./\\:*?\"<>|])?", text)
    if (text and not (fits and type(value) in (str, int))) or WINDOWS_DEVICES.match(text):
        raise Failure(f"id {value!a:.80} can't name a file")
    check_path(text)
    return text


################################################################################
# Journal
################################################################################
# What a batch has done: results.jsonl beside its pictures, one line for each step of a job.

SAVED, PARTIAL, SENT, UNKNOWN = "saved", "partial", "sent", "unknown"  # billed, or maybe so
DEFERRED, DEFERRED_BATCH = "deferred", "batch"  # a job in a batch at the server, and that batch
FAILED, REFUSED, REDO, LEFT = "failed", "refused", "redo", "left"
PAID_STATES = (SAVED, PARTIAL, SENT, UNKNOWN, DEFERRED)
JOURNAL_NAME = re.compile(r"results(-\d+-of-\d+)?\.jsonl")
OWN_NAMES = re.compile(r"results(-\d+-of-\d+)?\.(jsonl|lock)|index\.html", re.I)


class Entry(NamedTuple):
    """What a journal says last of one job."""

    identity: str
    state: str
    number: int
    id: str
    line: str  # hash of the line that asked for it
    job_id: str
    exit_code: int
    spent: float  # on all its saved answers
    estimate: float
    time: str
    place: tuple[str, int]  # journal, offset
    redo: bool = False  # a --redo chose it, and has not brought it to an end yet


class Journal:
    """One results.jsonl, held open; a line is written whole before add() returns."""

    def __init__(self, path: str, console: Console) -> None:
        self.path, self.console = path, console
        self.lock = allocate_lock()
        self.file: IO[bytes] | None = None

    def add(self, entry: Mapping[str, Any]) -> None:
        """Append one line. Raises Failure where it can't: then nothing more may be sent."""
        line = json.dumps({"schema": 1, "time": utc_text(), **entry}) + "\n"
        line = self.console.scrub(line)
        with self.lock:
            try:
                self.file = self.file or open_lines(self.path, 0o666)
                if os.name == "posix" and not os.fstat(self.file.fileno()).st_nlink:
                    raise OSError("it was removed")
                write_line(self.file, line)
            except OSError as error:
                self.file = None  # a torn line is ended at the next opening
                why = os_reason(error)
                raise Failure(f"cannot write {self.path}: {why}", EXIT_REFUSED) from None

    def tell(self, outcome: Outcome, entry: Mapping[str, Any], job_id: str) -> None:
        """Append what came of a job."""
        self.add({**outcome_entry(outcome, self.console), **entry, "job_id": job_id})


def open_lines(path: str, mode: int = 0o600) -> IO[bytes]:
    """Open a file of lines for appending; one that somebody was killed in is ended first."""
    flags = os.O_CREAT | os.O_APPEND | os.O_RDWR | getattr(os, "O_BINARY", 0)
    file = open(os.open(path, flags, mode), "a+b", buffering=0)
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - 1))
    if file.read(1) not in (b"", b"\n"):
        write_line(file, "\n")
    return file


def write_line(file: IO[bytes], line: str) -> None:
    """Append a line in one write, so that many processes can do so at once."""
    data = line.encode("ascii")
    if file.write(data) != len(data):
        raise OSError("no space left on device")


def utc_text(seconds: float | None = None) -> str:
    """Return a time, or the present one, as logs hold it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def read_lines(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (offset, object) of a file of JSON lines; torn and foreign ones are passed over."""
    offset = 0
    try:
        with open(path, "rb") as file:
            for line in file:
                for value in parse_json(line.decode("utf-8", "replace")):
                    if isinstance(value, dict):
                        yield offset, value
                offset += len(line)
    except FileNotFoundError:
        return
    except OSError as error:
        raise Failure(f"cannot read {path}: {os_reason(error)}", EXIT_REFUSED) from None


def journals_in(folder: str) -> list[str]:
    """Return the journals in a folder: what other shards saved counts too."""
    names = filter(JOURNAL_NAME.fullmatch, list_folder(folder))
    return sorted(os.path.join(folder, name) for name in names)


def list_folder(folder: str) -> list[str]:
    """Return the names in a folder that may not be there."""
    return os.listdir(folder) if os.path.isdir(folder) else []


def read_journals(paths: Iterable[str], sandbox: bool) -> dict[str, Entry]:
    """Return the last word on each job, by its identity; the sandbox's are a world of their own."""
    entries: dict[str, Entry] = {}
    for path in paths:
        own: dict[str, Entry] = {}
        sound = False
        begun = "\n" in file_text(path)  # asked first: another shard may write its first line now
        for offset, value in read_lines(path):
            identity = value.get("identity")
            sound = sound or isinstance(value.get("state"), str)
            if isinstance(identity, str) and bool(value.get("sandbox")) == sandbox:
                own[identity] = read_entry(value, (path, offset), own.get(identity))
        if begun and not sound:
            raise Failure(f"{path} holds no line that can be read", hint="mend it or move it away")
        for identity, entry in own.items():
            entries[identity] = later(entry, entries.get(identity))
    return entries


def later(entry: Entry, other: Entry | None) -> Entry:
    """Return which word on a job counts, of two journals: saved, maybe billed, else the newer."""
    if not other:
        return entry
    first, second = (
        (one.state == SAVED, one.state in PAID_STATES, one.time) for one in (entry, other)
    )
    return (entry if first >= second else other)._replace(spent=entry.spent + other.spent)


def file_text(path: str, limit: int = WINDOW) -> str:
    """Return the text that a file begins with, or nothing where it can't be read."""
    try:
        with open(path, "rb") as file:
            return file.read(limit).decode("utf-8", "surrogateescape")
    except OSError:
        return ""


def part(value: Any, name: str, kind: type) -> Any:
    """Return one part of a parsed object, or an empty one where it is of another kind."""
    found = value.get(name) if isinstance(value, dict) else None
    return found if isinstance(found, kind) else kind()


def read_entry(value: dict[str, Any], place: tuple[str, int], before: Entry | None) -> Entry:
    """Return one line of a journal as an Entry, with what earlier lines of the job spent."""
    state, guess = part(value, "state", str), part(value, "estimate", float)
    if state == REDO and before:
        return before._replace(redo=True)
    spent = before.spent if before else 0.0
    if state in (SAVED, PARTIAL):
        spent += part(part(value, "cost", dict), "amount", float) or guess
    return Entry(
        part(value, "identity", str),
        state or UNKNOWN,
        count(value, "number"),
        part(value, "id", str),
        part(value, "line", str),
        part(value, "job_id", str),
        count(value.get("error"), "exit_code"),
        spent,
        guess,
        part(value, "time", str),
        place,
        bool(before and before.redo and state == SENT),
    )


def line_at(place: tuple[str, int]) -> dict[str, Any]:
    """Return the object of one line of a journal."""
    with open(place[0], "rb") as file:
        file.seek(place[1])
        values = parse_json(file.readline().decode("utf-8", "replace"))
    return values[0] if values and isinstance(values[0], dict) else {}


def kept_part(line: dict[str, Any]) -> dict[str, Any]:
    """Return what of a job's line its next line says too."""
    return {name: line[name] for name in line if name not in ("schema", "time", "state")}


def state_of(outcome: Outcome) -> str:
    """Return the journal's word for an outcome: failed was not billed, refused is final too."""
    failure, answer = outcome.failure, outcome.answer
    if not failure:
        return SAVED
    if failure.exit_code == EXIT_PARTIAL:
        return PARTIAL
    kind = answer.verdict.kind if answer else ""
    if kind == "unsent" or (not answer and not failure.maybe_billed):
        return FAILED
    if kind == "refused" and not outcome.pictures:
        final = failure.exit_code in (EXIT_REFUSED, EXIT_POLICY)
        return REFUSED if final and (failure.http_status or 0) not in range(300, 400) else FAILED
    return UNKNOWN


def outcome_entry(outcome: Outcome, console: Console) -> dict[str, Any]:
    """Return what the journal says of an outcome."""
    document = outcome_document(outcome, console)
    return {
        "state": state_of(outcome),
        "paths": [picture.path for picture in outcome.pictures],
        "seconds": document["elapsed_s"],
        **{name: document[name] for name in ("images", "usage", "cost", "attempts", "error")},
    }


################################################################################
# Batch
################################################################################
# Many jobs, each by the same functions as a single request, in threads that share one pace, one
# journal and one terminal.


class Plan(NamedTuple):
    """One job of a batch as the check found it; small, as there may be thousands."""

    row: int  # in the JobsFile
    id: str
    identity: str  # hash of what is sent, and the how-manieth of its kind it is
    line: str  # the same of the line that asked for it
    output: str | None
    label: str  # what is sent, in a few words
    estimate: float
    number: int = 0  # it names the pictures, unless there is an id
    entry: Entry | None = None  # the journal's last word on it
    changed: Entry | None = None  # on the same line, when the options were others
    look: bool = False  # for an answer in the job folder of an earlier run
    send: bool = False  # where no answer is found

    @property
    def name(self) -> str:
        """What its pictures are named after, and its messages led by."""
        return self.id or f"{self.number:04}"

    @property
    def command(self) -> str:
        """generate or edit, which its label begins with."""
        return self.label.partition(" ")[0]


class Gate:
    """Lets POSTs through: paced by --rpm, all held back together after a 429."""

    def __init__(self, per_minute: int) -> None:
        self.interval = 60.0 / per_minute if per_minute else 0.0
        self.opens = 0.0
        self.lock = allocate_lock()

    def hold(self, seconds: float) -> bool:
        """Let nobody through for so long; return whether that is longer than it was."""
        with self.lock:
            before, self.opens = self.opens, max(self.opens, time.monotonic() + seconds)
            return self.opens > before + 1

    def enter(self) -> None:
        """Wait for one's turn. Raises Interrupted after a signal."""
        while True:
            with self.lock:
                now = time.monotonic()
                wait = self.opens - now
                if wait <= 0:
                    self.opens = now + self.interval
                    return
            SIGNALS.pause(min(wait, 1.0))


class JobKeeper(Keeper):
    """Keeps one job of a batch in step with the others, and its journal."""

    patience = float("inf")
    detached = True
    again = "--redo unknown sends it again, and may pay again"

    def __init__(self, batch: Batch, entry: dict[str, Any]) -> None:
        self.journal, self.gate, self.console = batch.journal, batch.gate, batch.console
        self.entry = entry
        self.sent = ""  # the id of the job that was sent
        self.told = False  # whether its outcome is on record
        self.mark = {"journal": os.path.realpath(self.journal.path), "entry": entry}

    def enter(self) -> None:
        """Wait for the gate."""
        try:
            self.gate.enter()
        except Interrupted as stop:
            raise stopped(stop.number, False, unsent=True) from None

    def sending(self, job: Job) -> None:
        """Put the POST on record."""
        self.journal.add({"state": SENT, **self.entry, "job_id": job.id})
        self.sent, self.told = job.id, False

    def pause(self, seconds: float) -> None:
        """Hold all workers back, not this one alone."""
        if self.gate.hold(seconds) and seconds >= 5:
            self.console.say(f"all wait {seconds:.0f} s, as the server asks")

    def done(self, job: Job, outcome: Outcome) -> None:
        """Put an outcome on record, before its job folder may go."""
        self.tell(outcome, job.id)

    def tell(self, outcome: Outcome, job_id: str) -> None:
        """Write an outcome into the journal."""
        self.journal.tell(outcome, self.entry, job_id)
        self.told = True


class Batch:
    """What the workers of one batch share."""

    def __init__(self, args: Args, settings: Settings, session: Session, jobs: JobsFile) -> None:
        self.args, self.settings, self.session, self.jobs = args, settings, session, jobs
        self.console = session.console
        self.defaults = chosen_options(args, settings)
        self.folder = batch_folder(args, settings)
        shard = "-{}-of-{}".format(*args.shard) if args.shard else ""
        self.stem = os.path.join(self.folder, f"results{shard}")
        self.journal = Journal(f"{self.stem}.jsonl", self.console)
        self.gate = Gate(args.rpm or 0)
        self.lock = allocate_lock()
        self.plans: list[Plan] = []
        self.plan_of: dict[str, Plan] = {}  # by identity
        self.states: dict[int, str] = {}  # of each plan's row, as it is now
        self.codes: dict[int, int] = {}  # exit codes of those that are not saved
        self.working = 0  # threads
        self.ended = 0  # jobs that this run brought to an end
        self.spent = 0.0  # by all runs, unknown ones at their estimate
        self.cost = 0.0  # of this run
        self.in_flight: dict[int, float] = {}  # estimates by row
        self.queue: list[Plan] = []  # the next one last
        self.stopping = ""  # why no more jobs are begun
        self.account_refusals = 0  # in a row, up to now
        self.broken: Failure | None = None
        self.folders: dict[str, str] = {}  # job folders of earlier runs, by id

    def request(self, row: int, console: Console) -> tuple[Request, dict[str, Any]]:
        """Return the checked request of one line, and the line. Raises Failure."""
        line = self.jobs.read(row)
        ask = ask_from_line(line, self.defaults, self.args)
        return build_request(ask, self.settings, console), line

    def target(self, plan: Plan, request: Request) -> Target:
        """Return where a job's pictures go: its own output, or names after its id or number."""
        force = bool(self.args.force)
        if plan.output is not None:
            return plan_target(plan.output, self.folder, request, self.settings, force)
        stem, total = self.stem_of(plan), request.total
        stems = tuple(f"{stem}-{k + 1}" for k in range(total)) if total > 1 else (stem,)
        return Target(self.folder, "", stems, total, force)

    def stem_of(self, plan: Plan) -> str:
        """Return what the names of a job's pictures begin with."""
        return plan.name + ("-sandbox" if self.settings.sandbox else "")

    def task(self, plan: Plan, keeper: JobKeeper, console: Console) -> Task:
        """Return a job as the pipeline takes it. Raises Failure where it isn't what was checked."""
        request, _ = self.request(plan.row, Console(quiet=True))
        if batch_hash(request) != plan.identity.partition("-")[0]:
            raise Failure("an input picture changed since the check", EXIT_REFUSED)
        fields = {name: value for name, value in request.fields if name != "prompt"}
        prompt = self.console.scrub(str(request.get("prompt")))[:2000]
        keeper.entry.update(command=request.command, prompt=prompt, fields=fields)
        session = self.session._replace(console=console, keeper=keeper)
        return Task(request, self.target(plan, request), self.settings, session)

    def entry(self, plan: Plan) -> dict[str, Any]:
        """Return what each of a job's lines in the journal says."""
        return {
            "id": plan.name,
            "number": plan.number,
            "file_line": self.jobs.rows[plan.row][0],
            "identity": plan.identity,
            "line": plan.line,
            "output": plan.output,
            "estimate": plan.estimate,
            "sandbox": self.settings.sandbox,
        }

    def work(self) -> None:
        """Work on one job after another: what one thread does."""
        plan = self.next_plan()
        while plan:
            console = JobConsole(self.console, plan.name)
            keeper = JobKeeper(self, self.entry(plan))
            try:
                outcome = self.perform(plan, keeper, console)
            except Interrupted as stop:
                outcome = Outcome("", failure=stopped(stop.number, False, unsent=not keeper.sent))
            except (Failure, OSError) as error:
                outcome = self.broken_off(plan, keeper, error)
            self.finish(plan, outcome, console)
            plan = self.next_plan()

    def next_plan(self) -> Plan | None:
        """Return the next job, once the money allows it, or None when no more are to be begun."""
        while True:
            with self.lock:
                if self.stopping or SIGNALS.number or not self.queue:
                    return None
                if self.affordable(self.queue[-1]):
                    plan = self.queue.pop()
                    self.in_flight[plan.row] = plan.estimate if plan.send else 0.0
                    return plan
                if not self.in_flight:
                    self.stopping = f"--max-cost {self.args.max_cost:g} is reached"
                    return None
            time.sleep(0.2)

    def affordable(self, plan: Plan) -> bool:
        """Return whether --max-cost leaves room: spent and unknown, in flight, and this one."""
        if self.args.max_cost is None or not plan.send:
            return True
        total = self.spent + sum(self.in_flight.values()) + plan.estimate
        return bool(total <= self.args.max_cost + 1e-9)

    def perform(self, plan: Plan, keeper: JobKeeper, console: Console) -> Outcome:
        """Finish what an earlier run left of a job, else send it."""
        task = self.task(plan, keeper, console)
        job = self.take_up(plan) if plan.look else None
        if job:
            outcome = carry_out(job, task)
            lacking = state_of(outcome) == UNKNOWN and not outcome.pictures
            if not (lacking and plan.send) or SIGNALS.number:
                return outcome
        if plan.send:
            return carry_out(create_job(task), task)
        why = "it was sent, its outcome is unknown, and no answer of it is kept"
        failure = Failure(why, EXIT_UNKNOWN, hint=JobKeeper.again, maybe_billed=True)
        outcome = Outcome(task.request.command, task.request, failure=failure)
        if plan.entry and plan.entry.state == SENT:
            keeper.tell(outcome, plan.entry.job_id)
        return outcome

    def take_up(self, plan: Plan) -> Job | None:
        """Return the job folder that an earlier run left, if something may be in it."""
        folder = self.folders.get(plan.entry.job_id, "") if plan.entry else ""
        if not os.path.exists(os.path.join(folder, RECORD)):
            return None
        job = take_job(folder)
        if not job:
            raise Failure("another process works on it", EXIT_UNKNOWN, code="under_way")
        if not (job.answered or job.untouched or curl_lives(job)):
            if plan.send:
                set_status(job, "set aside")
            job.lock.close()
            return None
        return job._replace(resumed=True)

    def broken_off(self, plan: Plan, keeper: JobKeeper, error: Exception) -> Outcome:
        """Return the outcome of a job that a fault of ours ended, and put it on record.

        What was sent, now or by an earlier run, is never journalled as not billed.
        """
        failure = error if isinstance(error, Failure) else Failure(str(error), EXIT_REFUSED)
        if isinstance(error, OSError):
            failure.message = f"{os_reason(error)}: {error.filename or plan.name}"
        failure.maybe_billed = failure.maybe_billed or plan.look or bool(keeper.sent)
        outcome = Outcome("", failure=failure)
        try:
            if not plan.look and not keeper.told:
                keeper.tell(outcome, keeper.sent)
        except Failure as broken:
            self.broken, self.stopping = broken, broken.message
        return outcome

    def finish(self, plan: Plan, outcome: Outcome, console: Console) -> None:
        """Put a job's end into the sums, and tell it."""
        failure, state = outcome.failure, state_of(outcome)
        if failure and failure.code == "under_way":
            state = LEFT
        elif failure and failure.code == "interrupted" and state == FAILED:
            failure, state = None, LEFT
        cost = outcome.cost.amount if outcome.cost else plan.estimate
        known = plan.entry.estimate if plan.entry and plan.look and not plan.send else 0.0
        with self.lock:
            del self.in_flight[plan.row]
            self.ended += 1
            self.states[plan.row] = state
            self.codes[plan.row] = failure.exit_code if failure else EXIT_OK
            billed = cost if state in (SAVED, PARTIAL) else plan.estimate
            self.spent += (billed if state in PAID_STATES else 0.0) - known
            self.cost += cost if state in (SAVED, PARTIAL) else 0.0
            if self.args.fail_fast and failure:
                self.stopping = self.stopping or f"{plan.name} {state} and --fail-fast is given"
            account = failure and (failure.exit_code == EXIT_AUTH or failure.hint == QUOTA_HINT)
            self.account_refusals = self.account_refusals + 1 if account else 0
            if self.account_refusals >= ACCOUNT_REFUSALS:
                why = f"the last {ACCOUNT_REFUSALS} jobs were refused for the key or the account"
                self.stopping = self.stopping or why
        if console.json and state != LEFT:
            document = {**outcome_document(outcome, console), "command": plan.command}
            self.console.document({**document, "id": plan.name, "state": state})
        if failure:
            console.error(f"{console.name}: {failure}")


def batch_folder(args: Args, settings: Settings) -> str:
    """Return the output folder: --output-dir, else the jobs file's name without its suffix."""
    path = args.words[0]
    if args.output_dir == "":
        raise Failure("--output-dir is empty")
    if args.output_dir is not None:
        return os.path.abspath(os.path.expanduser(args.output_dir))
    if path == "-":
        raise Failure("jobs from standard input need an --output-dir")
    stem = os.path.splitext(path)[0] + ("-sandbox" if settings.sandbox else "")
    if settings.table["output_dir"].source != "default":
        stem = os.path.join(os.path.expanduser(settings.output_dir), os.path.basename(stem))
    if os.path.abspath(stem) == os.path.abspath(path):
        raise Failure(f"{path} has no suffix to take off", hint="pass --output-dir")
    return os.path.abspath(stem)


def check_jobs(batch: Batch, entries: dict[str, Entry], seen: dict[str, int]) -> list[Plan]:
    """Return every job of the file, checked. Raises Failure (exit 2) with every bad line told."""
    faults = list(batch.jobs.faults)
    warnings: dict[str, list[int]] = {}
    plans, word = [], batch.jobs.word
    for row, (number, _) in enumerate(batch.jobs.rows):
        console = Console(quiet=True)
        try:
            plans.append(check_job(batch, row, seen, entries, console))
        except Failure as failure:
            faults.append((number, str(failure)))
        for warning in console.warnings:
            warnings.setdefault(warning, []).append(number)
    for warning, numbers in warnings.items():
        more = f" and {len(numbers) - 1} more" if len(numbers) > 1 else ""
        batch.console.warn(f"{word} {numbers[0]}{more}: {warning}")
    for number, fault in sorted(faults):
        batch.console.error(f"{PROGRAM}: {word} {number}: {fault}")
    if faults:
        lines = f"{plural(len(faults), word)} of {len(batch.jobs.rows) + len(batch.jobs.faults)}"
        first = "{} {}: {}".format(word, *min(faults))
        raise Failure(f"{lines} can't be used, so nothing was sent; the first is {first}")
    return plans


def check_job(
    batch: Batch, row: int, seen: dict[str, int], entries: dict[str, Entry], console: Console
) -> Plan:
    """Return one job as a Plan. Raises Failure for a line that can't be sent as it is."""
    request, line = batch.request(row, console)
    estimate = estimate_cost(request, batch.settings)
    words = [request.command, *(request.get(name) for name in ("model", "size", "quality"))]
    plan = Plan(
        row,
        line_id(line),
        occurrence(batch_hash(request), seen),
        occurrence(line_hash(line), seen),
        line_path(line, "output"),
        sys.intern(" ".join(str(word) for word in words if word)),
        estimate.amount if estimate else 0.0,
    )
    for file in request.files:
        path = same_name(file.path)
        if f"out {path}" in seen:
            raise Failure(f"image {file.path} is what another line writes")
        seen[f"in {path}"] = row
    if plan.id or plan.output:
        claim_names(plan, batch.target(plan, request), batch, seen)
    entry = entries.get(plan.identity)
    if plan.output and not (entry and entry.state in PAID_STATES):
        check_target(batch.target(plan, request), bool(batch.args.sidecar))
    return plan


def claim_names(plan: Plan, target: Target, batch: Batch, seen: dict[str, int]) -> None:
    """Refuse names that another line has, or that are files which the batch needs."""
    if plan.output == "-":
        raise Failure("output is a file here, as standard output tells what was saved")
    paths = [target.path(k, "png") for k in range(target.planned)] if target.name or plan.id else []
    for path in map(same_name, paths):
        stem, name = os.path.splitext(path)[0], os.path.basename(path)
        own = OWN_NAMES.fullmatch(name) and os.path.dirname(path) == same_name(batch.folder)
        if own or path == same_name(batch.args.words[0]):
            raise Failure(f"output {plan.output} is a file of the batch itself")
        if f"in {path}" in seen:
            raise Failure(f"output {plan.output} is an input picture of this batch")
        seen[f"out {path}"] = plan.row
        if seen.setdefault(stem, plan.row) != plan.row:
            raise Failure(f"{name} is what {batch.jobs.place(seen[stem])} is saved as")


def same_name(path: str) -> str:
    """Return a path as file systems may take it for the same: no links, no case."""
    folder, name = os.path.split(os.path.abspath(path))
    return os.path.normcase(os.path.join(os.path.realpath(folder), name)).lower()


def claimed_numbers(batch: Batch, seen: dict[str, int]) -> set[int]:
    """Return the numbers that no job may get, as an id or output has their name."""
    folder = same_name(batch.folder) + os.sep
    matches = (
        re.fullmatch(r"([0-9]{4,9})(-[0-9]+)?", claim[len(folder) :])
        for claim in seen
        if claim.startswith(folder)
    )
    return {int(match[1]) for match in matches if match}


def batch_hash(request: Request) -> str:
    """Return what a job is known by: what is sent, but for a format that only a name asked for."""
    fields = tuple(pair for pair in request.fields if pair != ("output_format", "png"))
    return request_hash(request._replace(fields=fields))[:16]


def line_hash(line: dict[str, Any]) -> str:
    """Return what a line is known by, whatever options stand around it."""
    return light_sha256(json.dumps(line, sort_keys=True).encode("ascii"))[:16]


def occurrence(key: str, seen: dict[str, int]) -> str:
    """Return a hash and the how-manieth of its kind it is: equal ones are variants."""
    seen[key] = seen.get(key, 0) + 1
    return f"{key}-{seen[key]}"


def match_plans(
    plans: list[Plan], entries: dict[str, Entry], batch: Batch, claimed: set[int]
) -> list[Plan]:
    """Return this shard's jobs with what the journal says of them and what is to be done.

    Raises Failure (exit 2) where a change of options would pay again for what is there.
    """
    shard, shards = batch.args.shard or (1, 1)
    pending = any(entry.redo for entry in entries.values())
    numbered = list(number_plans(plans, entries, claimed))
    check_names(numbered, batch)
    own = [plan for plan in numbered if plan.row % shards == shard - 1]
    own = [decide(plan, pending, batch.args.redo) for plan in own]
    check_redo(batch.args.redo, own)
    check_foreign(own, {entry.id for entry in entries.values()}, batch)
    differing = [
        plan for plan in own if plan.changed and plan.changed.state in PAID_STATES and not plan.send
    ]
    if differing:
        raise differing_failure(differing, batch)
    return own


def number_plans(plans: list[Plan], entries: dict[str, Entry], claimed: set[int]) -> Iterator[Plan]:
    """Yield the jobs with their entries and numbers: those of before, else their place in the
    file, else a free one."""
    current = {plan.identity for plan in plans}
    gone = {entry.line: entry for key, entry in entries.items() if key not in current}
    kept = [e for key, e in entries.items() if key in current or e.state in PAID_STATES]
    taken = claimed | {entry.number for entry in kept}
    free = max([len(plans), *taken])
    for plan in plans:
        entry, number = entries.get(plan.identity), plan.row + 1
        changed = None if entry else gone.get(plan.line)
        before = entry or changed
        if before:
            number = before.number
        elif number in taken:
            free = number = free + 1
        yield plan._replace(number=number, entry=entry, changed=changed)


def check_names(plans: Iterable[Plan], batch: Batch) -> None:
    """Refuse a line whose id is the number of another."""
    names: dict[str, int] = {}
    for plan in plans:
        first = names.setdefault(plan.name, plan.row)
        if first != plan.row:
            this, other = batch.jobs.place(plan.row), batch.jobs.place(first)
            raise Failure(f"{this}: {other} is saved under this name already")


def check_foreign(plans: list[Plan], known: set[str], batch: Batch) -> None:
    """Refuse a name that a file has which is not from this batch, unless --force is given."""
    there = {os.path.splitext(name)[0] for name in list_folder(batch.folder)}
    for plan in plans:
        stem = batch.stem_of(plan)
        ours = plan.output or plan.entry or plan.name in known or batch.args.force
        if not ours and there & {stem, f"{stem}-1"}:
            hint = "pass --force to replace it, or another --output-dir"
            raise Failure(f"{stem} is in {batch.folder} and no journal knows it", hint=hint)


def decide(plan: Plan, pending: bool, redo: str | None) -> Plan:
    """Return a plan with what is to be done: nothing, look for an answer, send, or look and send.

    A --redo that was cut short is finished before another one begins (`pending`).
    """
    state = plan.entry.state if plan.entry else ""
    names = [] if redo is None or redo in REDO_WORDS else redo.split(",")
    named = redo == "all" or plan.name in names
    again = named and bool(not pending or (plan.entry and plan.entry.redo))
    again = again or (redo == "failed" and state == REFUSED)
    again = again or (redo == "unknown" and state in (PARTIAL, SENT, UNKNOWN))
    if plan.changed and plan.changed.state in PAID_STATES:
        return plan._replace(send=redo == "changed" or again)
    return plan._replace(send=again or state in ("", FAILED), look=state in (SENT, UNKNOWN))


def differing_failure(plans: list[Plan], batch: Batch) -> Failure:
    """Return the refusal to pay again for lines that are the same with options that aren't."""
    request, _ = batch.request(plans[0].row, Console(quiet=True))
    entries = [plan.changed for plan in plans if plan.changed]
    before = part(line_at(entries[0].place), "fields", dict)
    now = {name: value for name, value in request.fields if name != "prompt"}
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    what = "an input picture"
    if names:
        what = f"{names[0]} {before.get(names[0], 'unset')} -> {now.get(names[0], 'unset')}"
    saved = "saved" if all(entry.state == SAVED for entry in entries) else "saved or maybe billed"
    jobs = plural(len(plans), f"{saved} job")
    verb = "differs" if len(plans) == 1 else "differ"
    return Failure(f"{jobs} {verb} ({what})", hint="--redo changed pays for them again")


def check_redo(redo: str | None, plans: list[Plan]) -> None:
    """Refuse an id in --redo that no job has."""
    names = {plan.name for plan in plans}
    for name in (redo or "all").split(","):
        if name not in names and name not in REDO_WORDS:
            words = ", ".join(REDO_WORDS)
            raise Failure(f"--redo {name}: no job has this id{nearest(name, names)}", hint=words)


REDO_WORDS = ("failed", "unknown", "changed", "all")


def lock_batch(batch: Batch) -> IO[bytes]:
    """Return the lock of a batch, held; Failure (exit 2) names who else holds it."""
    path = f"{batch.stem}.lock"
    try:
        lock = try_lock(path)
    except OSError as error:
        raise Failure(f"cannot write {path}: {os_reason(error)}") from None
    if not lock:
        with open(path, "rb") as file:
            pid = printable(file.read(20).decode("ascii", "replace"))
        raise Failure(f"this batch is under way in process {pid}", hint="wait for it to end")
    lock.truncate(0)
    lock.write(str(os.getpid()).encode("ascii"))
    lock.flush()
    refuse_other_shards(batch)
    return lock


def refuse_other_shards(batch: Batch) -> None:
    """Refuse to run beside a run that splits the same jobs in another way."""
    own = re.sub(r"-\d+-of", "-N-of", os.path.basename(batch.stem))
    for name in os.listdir(batch.folder):
        stem, suffix = os.path.splitext(name)
        splits_alike = re.sub(r"-\d+-of", "-N-of", stem) == own
        if suffix != ".lock" or splits_alike or not JOURNAL_NAME.fullmatch(f"{stem}.jsonl"):
            continue
        other = try_lock(os.path.join(batch.folder, name))
        if not other:
            raise Failure(f"another run in {batch.folder} splits the jobs in another way ({stem})")
        other.close()


def left_folders(batch: Batch, entries: dict[str, Entry]) -> dict[str, str]:
    """Return the job folders that earlier runs left, by id; those that are of no use go."""
    journals = [os.path.realpath(path) for path in journals_in(batch.folder)]
    by_id = {entry.job_id: entry for entry in entries.values()}
    found = {}
    for folder in list_jobs():
        entry = by_id.get(os.path.basename(folder))
        mark = part(read_record(folder), "batch", dict)
        if not mark or not (entry or mark.get("journal") in journals):
            continue
        ended = entry.state in (SAVED, FAILED, REFUSED) if entry else False
        job = None if entry and not ended else take_job(folder)
        if job and (ended or job.untouched) and not curl_lives(job):
            remove_job(job)  # we were killed before it was sent, or after it was saved
            continue
        if job:
            job.lock.close()
        found[os.path.basename(folder)] = folder
    return found


class BatchProgress(Progress):
    """One line for all jobs: done, failed, left, money, rate and time left."""

    lead = "batch: "

    def __init__(self, batch: Batch) -> None:
        super().__init__(batch.console)
        self.batch = batch

    def text(self, seconds: int, received: int) -> str:
        """Return the line."""
        totals = count_states(self.batch)
        done = totals[SAVED] + totals["skipped"]
        bad = sum(totals[state] for state in (PARTIAL, FAILED, REFUSED, UNKNOWN))
        words = [f"{done} done", f"{bad} failed", f"{totals[LEFT]} left"]
        currency = self.batch.settings.provider.currency
        words += [str(Cost(self.batch.cost, currency))] if self.batch.cost else []
        if self.batch.ended and seconds:
            rate = self.batch.ended / seconds
            words.append(f"{60 * rate:.1f}/min, {time_text(totals[LEFT] / rate)} left")
        return ", ".join(words)


def time_text(seconds: float) -> str:
    """Return a time as a person reads it."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def run_workers(batch: Batch) -> None:
    """Work off the queue in threads; this one shows progress and takes the signals."""
    from queue import Empty, SimpleQueue
    from threading import Thread

    # Not an Event: a signal that raises in its wait() may find the lock inside it let go already.
    ended: SimpleQueue[None] = SimpleQueue()
    progress, gallery = BatchProgress(batch), Gallery(batch)
    interrupted = False

    def work() -> None:
        try:
            batch.work()
        finally:
            with batch.lock:
                batch.working -= 1
            ended.put(None)

    batch.working = min(batch.args.concurrency, len(batch.queue))
    for _ in range(batch.working):
        Thread(target=work, daemon=True).start()
    while batch.working:
        try:
            if interrupted:
                ended.get(timeout=0.2)
            else:
                with SIGNALS:
                    ended.get(timeout=min(progress.interval, 1.0))
        except Empty:
            pass
        except Interrupted:
            if interrupted:
                raise  # the second one: leave now
            interrupted = True
            under_way = plural(len(batch.in_flight), "request")
            batch.console.say(f"stopping; {under_way} under way: {STOP_GRACE_SECONDS:.0f} s more")
        gallery.refresh()
        progress.tick(0)
    progress.stop()


def count_states(batch: Batch) -> dict[str, int]:
    """Return how many jobs are in each state; `skipped` ones were saved by an earlier run."""
    names = (SAVED, "skipped", PARTIAL, FAILED, REFUSED, UNKNOWN, DEFERRED, LEFT)
    totals = dict.fromkeys(names, 0)
    for state in list(batch.states.values()):
        totals[UNKNOWN if state == SENT else state] += 1
    return totals


def batch_failure(batch: Batch, totals: dict[str, int]) -> Failure | None:
    """Return why not every job is saved, with the exit code for the whole."""
    total, done = len(batch.plans), totals[SAVED] + totals["skipped"]
    if batch.broken:
        return batch.broken
    if done == total:
        return None
    why = f"; {batch.stopping}" if batch.stopping else ""
    message = f"{done} of {plural(total, 'job')} are saved{why}"
    codes = {code for code in batch.codes.values() if code}
    exit_code = (
        EXIT_PARTIAL if done + totals[PARTIAL] else codes.pop() if len(codes) == 1 else EXIT_REFUSED
    )
    if not codes and not done and batch.stopping:
        exit_code = EXIT_LIMIT
    if SIGNALS.number:
        exit_code, message = 128 + SIGNALS.number, f"stopped: {message}"
    billed = bool(totals[UNKNOWN] + totals[PARTIAL])
    return Failure(message, exit_code, hint=batch_hint(totals), maybe_billed=billed)


def batch_hint(totals: dict[str, int]) -> str:
    """Return the way on from a batch that is not all saved."""
    if totals[DEFERRED]:
        return "--deferred tells how far the deferred ones are, and fetches them"
    if totals[FAILED] or totals[LEFT]:
        return "run the same command again to go on"
    if totals[UNKNOWN] or totals[PARTIAL]:
        return "--redo unknown sends again what may have been billed"
    return "change the lines that were refused, or pass --redo failed"


def report_batch(batch: Batch, seconds: float) -> int:
    """Print the table at the end and return the exit code."""
    console, totals = batch.console, count_states(batch)
    failure = batch_failure(batch, totals)
    cost = Cost(batch.cost, batch.settings.provider.currency) if batch.cost else None
    if console.json:
        document = base_document("batch", failure, console)
        summary = {"jobs": len(batch.plans), **totals, "cost": cost._asdict() if cost else None}
        files = {"folder": batch.folder, "journal": batch.journal.path}
        files["gallery"] = os.path.join(batch.folder, GALLERY)
        console.document({**document, "summary": summary, **files, "elapsed_s": round(seconds, 2)})
    shown = {name: str(n) for name, n in totals.items() if n or name != DEFERRED}
    cells = {**shown, "cost": str(cost or "-")}
    for row in (cells, cells.values()):
        widths = (max(len(name), len(cell)) + 2 for name, cell in cells.items())
        console.say("".join(f"{cell:>{width}}" for cell, width in zip(row, widths)))
    if os.path.isfile(os.path.join(batch.folder, GALLERY)):
        console.say(f"Gallery: {os.path.join(batch.folder, GALLERY)}")
    if failure:
        console.error(f"{PROGRAM}: {failure}")
    return failure.exit_code if failure else EXIT_OK


def show_batch(batch: Batch) -> int:
    """Print what a batch would do, job by job; create nothing."""
    console, total = batch.console, 0.0
    counts = {"send": 0, "look": 0, "skip": 0}
    for plan in batch.plans:
        action = "send" if plan.send else "look" if plan.look else "skip"
        counts[action] += 1
        total += plan.estimate if plan.send else 0.0
        if console.json:
            keeper = JobKeeper(batch, batch.entry(plan))
            document = dry_run_document(batch.task(plan, keeper, console))
            more = {"id": plan.name, "action": action, "dry_run": document}
            emit_document(plan.command, more, console)
        else:
            prompt = printable(str(batch.jobs.read(plan.row).get("prompt", "")), 40)
            console.emit(f"{plan.name}  {action}  {plan.label}  {prompt}")
    known = total or not counts["send"]
    cost = Cost(total, batch.settings.provider.currency, True) if known else None
    summary = {**counts, "estimate": cost._asdict() if cost else None, "folder": batch.folder}
    if console.json:
        return emit_document("batch", {"summary": summary}, console)
    words = ", ".join(f"{number} to {action}" for action, number in counts.items())
    console.emit(f"{plural(len(batch.plans), 'job')}: {words}; would save in {batch.folder}")
    console.emit(f"estimate: {cost or 'no price is known here'}")
    return EXIT_OK


################################################################################
# Deferred
################################################################################
# The jobs of a batch through OpenAI's Batch API (SDK 3.52.0: batch_create_params.py, batch.py):
# one file of requests, one batch an endpoint, half the price, within 24 hours. What is asked of the
# server is in the journal before and after each step, so that a kill leads to no second batch.

MAX_DEFERRED_REQUESTS = 50_000
MAX_DEFERRED_BYTES = 200 * 1000 * 1000
DEFERRED_PRICE = 0.5  # OpenAI's pricing page, 2026-11-21
FIRST_POLL, LAST_POLL = 10.0, 300.0  # seconds between looks with --wait
ENDED_STATUSES = ("completed", "failed", "expired", "cancelled")
SERVER_ID = re.compile("[A-Za-z0-9_.-]{1,200}")  # it goes into URLs


class Deferred(NamedTuple):
    """One batch at the server, as the journal says; `step` is the last that was begun."""

    key: str  # ours: in its metadata, and the name of its folder
    step: str  # uploading, uploaded, creating, created or ended
    endpoint: str  # generations or edits
    file_id: str = ""
    batch_id: str = ""
    base: str = ""  # the server that has it


def read_deferred(journal: str) -> dict[str, Deferred]:
    """Return the batches that a journal knows, by key; what could lead elsewhere is passed over."""
    found = {}
    for _, value in read_lines(journal):
        if value.get("state") == DEFERRED_BATCH:
            deferred = Deferred(*(part(value, name, str) for name in Deferred._fields))
            ids = SERVER_ID.fullmatch(f"id{deferred.file_id}{deferred.batch_id}")
            if ids and re.fullmatch("[0-9a-f]{16}", deferred.key):
                found[deferred.key] = deferred
    return found


def note_deferred(deferred: Deferred, batch: Batch) -> Deferred:
    """Put a step on record."""
    batch.journal.add({"state": DEFERRED_BATCH, **deferred._asdict()})
    return deferred


def check_deferred(batch: Batch) -> None:
    """Refuse, before anything changes, a server without /batches and a price over --max-cost."""
    page = ask_api("batches?limit=1", batch.settings, batch.session)
    if not isinstance(page.get("data"), list):
        raise Failure(f"{batch.settings.base.host} has no /batches", EXIT_REFUSED)
    price = sum(plan.estimate for plan in batch.plans if plan.send)
    limit = batch.args.max_cost
    if limit is not None and price and batch.spent + price > limit:
        currency = batch.settings.provider.currency
        whole = Cost(batch.spent + price, currency, True)
        raise Failure(f"these jobs come to {whole}, over --max-cost {limit:g}")


def prepare_deferred(batch: Batch) -> list[tuple[Deferred, list[Plan]]]:
    """Write the requests of each endpoint into a file, unless a batch is pending already.

    Raises Failure (exit 2) for more than the API takes, with nothing left behind.
    """
    known = read_deferred(batch.journal.path).values()
    pending = any(deferred.step != "ended" for deferred in known)
    if batch.args.cancel or pending:
        if pending and any(plan.send for plan in batch.plans):
            batch.console.say("jobs that are in no batch yet are sent once this one has ended")
        return []
    found = []
    for command, endpoint in ENDPOINTS.items():
        plans = [plan for plan in batch.plans if plan.send and plan.command == command]
        if plans:
            key, base = os.urandom(8).hex(), batch.settings.base.url
            found.append((Deferred(key, "uploading", endpoint, base=base), plans))
    try:
        for deferred, plans in found:
            write_requests(deferred, plans, batch)
    except (OSError, Failure) as error:
        for deferred, _ in found:
            remove_folder(deferred_folder(deferred.key))
        if isinstance(error, Failure):
            raise
        why = f"cannot write the requests: {os_reason(error)}"
        raise Failure(why, EXIT_REFUSED) from None
    return found


def run_deferred(prepared: list[tuple[Deferred, list[Plan]]], batch: Batch) -> list[dict[str, Any]]:
    """Submit what was prepared, or see how far it is; return the batches that still run."""
    for deferred, plans in prepared:
        for plan in plans:
            keeper = JobKeeper(batch, batch.entry(plan))
            batch.task(plan, keeper, batch.console)  # fills in what the journal says of a job
            batch.journal.add({"state": DEFERRED, **keeper.entry, "job_id": deferred.key})
        note_deferred(deferred, batch)  # after its jobs: what was killed before is in no batch
    known = [one for one in read_deferred(batch.journal.path).values() if one.step != "ended"]
    for deferred in known:
        if deferred.base not in ("", batch.settings.base.url):
            raise Failure(f"a batch of these jobs is pending at {deferred.base}", EXIT_USAGE)
    pending = [create_deferred(one, batch) for one in known]
    pending = [one for one in pending if one.step == "created"]
    for deferred in pending if batch.args.cancel else ():
        try:
            where = f"batches/{deferred.batch_id}/cancel"
            ask_api(where, batch.settings, batch.session, [b"request = POST\n"])
        except Failure as failure:  # it has ended meanwhile, say
            batch.console.say(f"{deferred.batch_id}: {failure}")
    return follow_deferred(pending, batch)


def sweep_deferred(batch: Batch) -> bool:
    """Remove requests that a killed call never put on record; return whether that freed jobs."""
    own, known = os.path.realpath(batch.journal.path), read_deferred(batch.journal.path)
    root = os.path.dirname(deferred_folder(""))
    for key in list_folder(root):
        if key not in known and file_text(os.path.join(root, key, "journal")) == own:
            remove_folder(os.path.join(root, key))
    entries = read_journals([batch.journal.path], False).values()
    lost = [entry for entry in entries if entry.state == DEFERRED and entry.job_id not in known]
    for entry in lost:
        batch.journal.add({"state": FAILED, **kept_part(line_at(entry.place))})
    return bool(lost)


def deferred_folder(key: str) -> str:
    """Return where the requests and answers of a batch are kept."""
    return os.path.join(state_root(), "deferred", key)


def write_requests(deferred: Deferred, plans: list[Plan], batch: Batch) -> None:
    """Write the file of requests. Raises Failure where it is more than the API takes."""
    folder = deferred_folder(deferred.key)
    if len(plans) > MAX_DEFERRED_REQUESTS:
        most = f"{len(plans)} requests are over the API's {MAX_DEFERRED_REQUESTS}"
        raise Failure(most, hint="--shard I/N splits them")
    os.makedirs(folder, 0o700, exist_ok=True)
    owner = os.path.realpath(batch.journal.path).encode("utf-8", "surrogateescape")
    private_file(os.path.join(folder, "journal"), owner)
    path = os.path.join(folder, "requests.jsonl")
    private_file(path)
    with open(path, "wb") as file:
        for plan in plans:
            request, _ = batch.request(plan.row, Console(quiet=True))
            if request.get("stream"):
                raise Failure(f"{plan.name}: a stream can't be deferred")
            file.write(deferred_line(plan, request))
            if file.tell() > MAX_DEFERRED_BYTES:
                raise Failure("the requests are over the API's 200 MB", hint="use --shard I/N")


def deferred_line(plan: Plan, request: Request) -> bytes:
    """Return one request as a line; input pictures go along as data URLs."""
    from base64 import b64encode

    body = payload(request)
    for file in request.files:
        data = file.data
        if data is None:
            with open(file.path, "rb") as opened:
                data = opened.read()
        url = f"data:{FORMATS[file.info.format][1]};base64,{b64encode(data).decode('ascii')}"
        if file.field == "image":
            body.setdefault("images", []).append({"image_url": url})
        else:
            body[file.field] = {"image_url": url}
    line = {"custom_id": plan.identity, "method": "POST", "body": body}
    line["url"] = f"/v1/images/{request.endpoint}"
    return json.dumps(line).encode("ascii") + b"\n"


def ask_api(
    path: str, settings: Settings, session: Session, more: Sequence[bytes] = (), line_path: str = ""
) -> dict[str, Any]:
    """Return what the server answers to one call that costs nothing, but for a create's.

    A create has a `line_path`: after a signal its curl goes on, and the next call waits for it.
    Raises Failure; only a create's may be billed.
    """
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        body, head = os.path.join(folder, ANSWER), os.path.join(folder, HEADERS)
        url = f"{settings.base.url}/{path}"
        config = [*connection_lines(settings, url, settings.base.host), *key_lines(settings)]
        config += [curl_line("output", body), curl_line("dump-header", head), *more]
        path_of_line = line_path or os.path.join(folder, CURL_LINE)
        end = run_curl(b"".join(config), path_of_line, session, Watch(body))
        if end.signal:
            raise Interrupted(end.signal)
        if end.status == 200:
            values = parse_json(file_text(body, 8 * MEGABYTE))
            if values and isinstance(values[0], dict):
                return values[0]
        if path.startswith("batches?") and end.status in (200, 404, 405, 501):
            raise Failure(f"{settings.base.host} has no /batches", EXIT_REFUSED)
        verdict = judge(end, read_headers_file(head), read_reply(body), settings)
    if verdict.failure and (line_path or verdict.kind != "unknown"):
        raise verdict.failure
    raise free_failure(f"{url}: ", end)


def find_deferred(key: str, batch: Batch) -> str:
    """Return the id of the batch that carries our key, or nothing where there is none."""
    after, seen = "", set()  # type: str, set[str]
    while True:
        page = ask_api(f"batches?limit=100{after}", batch.settings, batch.session)
        rows = {part(row, "id", str): row for row in part(page, "data", list)}
        for name, row in rows.items():
            if name and part(part(row, "metadata", dict), "gpt_image2", str) == key:
                return str(name)
        if not page.get("has_more") or not set(rows) - seen:
            return ""
        seen |= set(rows)
        after = f"&after={list(rows)[-1]}"


def create_deferred(deferred: Deferred, batch: Batch) -> Deferred:
    """Bring a batch from the step where it stands to `created`; never makes a second one."""
    folder = deferred_folder(deferred.key)
    if deferred.step == "creating":
        while line_locked(os.path.join(folder, CURL_LINE)):
            SIGNALS.pause(0.2)  # the curl of a call that was stopped
        batch_id = find_deferred(deferred.key, batch)
        if batch_id:
            return note_deferred(deferred._replace(step="created", batch_id=batch_id), batch)
    if deferred.step == "created":
        return deferred
    if batch.args.cancel:
        return drop_deferred(deferred, "it was cancelled before it was made", batch)
    try:
        if deferred.step == "uploading":  # an upload costs nothing: done anew where it was cut
            deferred = upload_requests(deferred, os.path.join(folder, "requests.jsonl"), batch)
        return create_batch(deferred, os.path.join(folder, CURL_LINE), batch)
    except Failure as failure:
        if failure.http_status and 400 <= failure.http_status < 500 and not failure.maybe_billed:
            drop_deferred(deferred, failure.message, batch)
        raise


def upload_requests(deferred: Deferred, path: str, batch: Batch) -> Deferred:
    """Hand in the file of requests."""
    if not os.path.exists(path):
        raise Failure("the requests are gone", EXIT_REFUSED, http_status=410)
    name = f"filename=gpt-image2-{deferred.key}.jsonl;type=application/jsonl"
    form = [b'header = "Expect:"\n', curl_line("form-string", "purpose=batch")]
    form.append(curl_line("form", f"file=@{form_file(path)};{name}"))
    file_id = part(ask_api("files", batch.settings, batch.session, form), "id", str)
    if not SERVER_ID.fullmatch(file_id):
        raise Failure("the server took the requests, but named no file", EXIT_REFUSED)
    return note_deferred(deferred._replace(step="uploaded", file_id=file_id), batch)


def create_batch(deferred: Deferred, line_path: str, batch: Batch) -> Deferred:
    """Make the batch of an uploaded file: the one step that costs."""
    deferred = note_deferred(deferred._replace(step="creating"), batch)
    document = {
        "input_file_id": deferred.file_id,
        "endpoint": f"/v1/images/{deferred.endpoint}",
        "completion_window": "24h",
        "metadata": {"gpt_image2": deferred.key},
    }
    lines = [b'header = "Content-Type: application/json"\n']
    lines.append(curl_line("data-binary", json.dumps(document)))
    session = batch.session._replace(keeper=JobKeeper(batch, {}))
    batch_id = part(ask_api("batches", batch.settings, session, lines, line_path), "id", str)
    if not SERVER_ID.fullmatch(batch_id):
        why = "the answer to a new batch has no id; the same command looks for it"
        raise Failure(why, EXIT_UNKNOWN, maybe_billed=True)
    batch.console.say(f"Batch: {batch_id}")
    return note_deferred(deferred._replace(step="created", batch_id=batch_id), batch)


def drop_deferred(deferred: Deferred, why: str, batch: Batch) -> Deferred:
    """End a batch that the server never had: its jobs are not billed, and may be sent again."""
    end_rest(deferred_jobs(deferred, batch), why, False, batch)
    remove_folder(deferred_folder(deferred.key))
    return note_deferred(deferred._replace(step="ended"), batch)


def follow_deferred(pending: list[Deferred], batch: Batch) -> list[dict[str, Any]]:
    """See how far the batches are, fetch those that have ended, and return how the others are."""
    delay, said = FIRST_POLL, ""
    while True:
        rows = []
        for deferred in list(pending):
            row = look_after(deferred, batch)
            if row:
                rows.append(row)
            else:
                pending.remove(deferred)
        text = ", ".join("{id}: {status} {completed}/{total}".format(**row) for row in rows)
        if text and text != said:
            batch.console.say(text)
        if not rows or not batch.args.wait:
            return rows
        said = text
        SIGNALS.pause(delay)
        delay = min(1.5 * delay, LAST_POLL)


def look_after(deferred: Deferred, batch: Batch) -> dict[str, Any]:
    """Return how far a batch is; one that has ended is fetched, and nothing returned.

    With --wait a look that fails for now is told and taken for one that says nothing new.
    """
    try:
        document = ask_api(f"batches/{deferred.batch_id}", batch.settings, batch.session)
        if part(document, "status", str) not in ENDED_STATUSES:
            return deferred_row(document)
        fetch_deferred(deferred, document, batch)
        return {}
    except Failure as failure:
        if failure.http_status == 404 and batch.args.cancel:
            end_rest(deferred_jobs(deferred, batch), "the server knows no such batch", True, batch)
            note_deferred(deferred._replace(step="ended"), batch)
            return {}
        if failure.http_status == 404:
            failure.hint = "other key or server than it was made with? --cancel gives it up"
        passing = failure.passing or failure.exit_code in (EXIT_NETWORK, EXIT_LIMIT)
        if not batch.args.wait or not passing:
            raise
        batch.console.say(f"{deferred.batch_id}: {failure}")
        told = {"id": deferred.batch_id, "status": "unseen", "endpoint": deferred.endpoint}
        return {**told, "total": 0, "completed": 0, "failed": 0}


def deferred_row(document: dict[str, Any]) -> dict[str, Any]:
    """Return what is told of a batch that still runs."""
    counts = part(document, "request_counts", dict)
    told = {name: part(document, name, str) for name in ("id", "status", "endpoint")}
    return {**told, **{name: count(counts, name) for name in ("total", "completed", "failed")}}


def fetch_deferred(deferred: Deferred, document: dict[str, Any], batch: Batch) -> None:
    """Save what a batch brought, job by job, and put an end to it.

    Raises Failure where a folder can't take its pictures: the next call finds them kept.
    """
    due, kept = deferred_jobs(deferred, batch), set()
    status, gone = part(document, "status", str), False
    for name in ("output_file_id", "error_file_id"):
        file_id = part(document, name, str)
        path = fetch_file(file_id, deferred, name, batch) if file_id else os.devnull
        gone = gone or not path
        for value, skeleton in result_lines(path or os.devnull):
            entry = due.pop(part(value, "custom_id", str), None)
            if entry:
                with SIGNALS:
                    pass
                answer = judge_result(value, skeleton, batch.settings)
                kept.add(end_job(entry, answer, path, batch))
    if "again" in kept:
        why = f"pictures can't be saved; they are kept in {deferred_folder(deferred.key)}"
        raise Failure(why, EXIT_UNSAVED, hint="mend the folder and run the same command again")
    rows = part(part(document, "errors", dict), "data", list)
    why = ": ".join([f"the batch is {status}", *(part(row, "message", str) for row in rows[:3])])
    why = f"{why}; its results are gone from the server (404)" if gone else why
    end_rest(due, why, gone or status == "completed", batch)
    note_deferred(deferred._replace(step="ended"), batch)
    if "bad" in kept or (due and status == "completed" and not gone):
        batch.console.warn(f"what could not be saved is kept in {deferred_folder(deferred.key)}")
    else:
        remove_folder(deferred_folder(deferred.key))


def fetch_file(file_id: str, deferred: Deferred, name: str, batch: Batch) -> str:
    """Return the path of a file from the server, going on where an earlier call was cut.

    An empty path means that the server has it no more.
    """
    path = os.path.join(deferred_folder(deferred.key), f"{name}.jsonl")
    os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
    for attempt in range(1, MAX_FETCHES + 1):
        while line_locked(f"{path}.curl"):
            SIGNALS.pause(0.2)  # the curl of a call that was killed
        if os.path.exists(path):
            return path
        end = fetch_part(file_id, f"{path}.part", f"{path}.curl", batch)
        if end.code == 0 and end.status in (200, 206):
            unpack(f"{path}.part")
            os.replace(f"{path}.part", path)
            return path
        if end.status in (404, 410):
            return ""
        if end.code == 33 or end.status == 416:
            remove_file(f"{path}.part")
        elif not worth_retrying(end):
            break
        else:
            SIGNALS.pause(retry_delay(attempt, None))
    failure = free_failure(f"file {file_id}: ", end)
    failure.exit_code, failure.hint = EXIT_UNSAVED, "run the same command again"
    raise failure


def fetch_part(file_id: str, path: str, line_path: str, batch: Batch) -> CurlEnd:
    """Run curl once for a file at the server, from where `path` ends."""
    settings = batch.settings
    url = f"{settings.base.url}/files/{file_id}/content"
    patient = settings._replace(timeout=86400)  # it may be gigabytes; a stall ends it
    lines = [*connection_lines(patient, url, settings.base.host), *key_lines(settings)]
    lines += resume_lines(path)
    end = run_curl(b"".join(lines), line_path, batch.session, Watch(path))
    if end.signal:
        raise Interrupted(end.signal)
    return end


def result_lines(path: str) -> Iterator[tuple[dict[str, Any], Skeleton]]:
    """Yield the lines of a result file, their pictures left in it as Spans."""
    from itertools import chain

    skeleton, torn = Skeleton(lines=True), False
    with open(path, "rb") as file:
        for window in chain(iter(lambda: file.read(WINDOW), b""), [b"\n"]):
            try:
                skeleton.feed(window)
            except ValueError:
                torn = True  # a line with too much text: passed over, to its end
            *lines, rest = bytes(skeleton.text).split(b"\n")
            if torn:
                torn, lines, rest = not lines, lines[1:], rest if lines else b""
            skeleton.text[:] = rest
            for line in lines:
                for value in parse_json(line.decode("utf-8-sig", "replace")):
                    if isinstance(value, dict):
                        yield value, skeleton


def deferred_jobs(deferred: Deferred, batch: Batch) -> dict[str, Entry]:
    """Return the jobs of a batch that nothing has come of yet, by identity."""
    entries = read_journals(journals_in(batch.folder), False)
    key = deferred.key
    return {name: e for name, e in entries.items() if e.state == DEFERRED and e.job_id == key}


def judge_result(value: dict[str, Any], skeleton: Skeleton, settings: Settings) -> Answer:
    """Return what one line of a result file says: what failed at the server is not billed."""
    response, error = part(value, "response", dict), parse_error(value, skeleton)
    status = count(response, "status_code")
    reply = reply_from_documents("json", [part(response, "body", dict)], skeleton)
    end = CurlEnd(0, status)
    if error or status >= 500 or not status:
        why = error_text(error or reply.error, f"HTTP {status}")
        code = error.code if error else ""
        verdict = Verdict("unsent", Failure(f"{why}; not billed", EXIT_REFUSED, code=code))
    else:
        verdict = judge(end, {}, reply, settings)
    headers = {"x-request-id": part(response, "request_id", str)}
    return Answer(verdict, reply, end, headers, 1)


def end_rest(due: dict[str, Entry], why: str, unknown_too: bool, batch: Batch) -> None:
    """Put on record that the jobs which a batch still has brought nothing."""
    for entry in due.values():
        failure = Failure(why, EXIT_REFUSED)
        if unknown_too:
            failure = Failure(f"{why}, without a word on this job", EXIT_UNKNOWN, maybe_billed=True)
        verdict = Verdict("unknown" if unknown_too else "unsent", failure)
        end_job(entry, Answer(verdict, Reply("empty"), CurlEnd(0), {}, 1), "", batch)


def end_job(entry: Entry, answer: Answer, path: str, batch: Batch) -> str:
    """Save what a deferred job brought, as its journal line has it, and put that on record.

    Returns "again" where its folder can't take the pictures, which stay in the result file at
    `path`, and "bad" where they are none; else nothing. Raises Interrupted after a signal.
    """
    task, plan = deferred_task(entry, batch)
    console, keeper = task.console, task.session.keeper
    folder = os.path.join(deferred_folder(entry.job_id), entry.identity)
    try:
        if answer.reply.images:
            check_folder(task.target.folder)
    except Failure as failure:
        console.error(f"{console.name}: {failure}")
        return "again"
    if any(source.kind == "url" for source in answer.reply.images):
        os.makedirs(folder, 0o700, exist_ok=True)
    outcome = Outcome(task.request.command, task.request, answer=answer, job_id=entry.identity)
    with open(os.devnull, "rb") as nothing:
        outcome = save_answer(outcome, Job(folder, nothing, answer=path), task)
    failure_code = outcome.failure.exit_code if outcome.failure else EXIT_OK
    if failure_code > 128:
        raise Interrupted(failure_code - 128)
    if any(os.path.dirname(picture.path) == folder for picture in outcome.pictures):
        remove_folder(folder)  # the disk is full: the result file has them all
        return "again"
    keep_record(outcome, task)
    assert isinstance(keeper, JobKeeper)
    keeper.tell(outcome, entry.identity)
    batch.in_flight[plan.row] = 0.0
    batch.finish(plan, outcome, console)
    if plan.row < 0:  # its line is no longer in the jobs file
        del batch.states[plan.row], batch.codes[plan.row]
    return "bad" if failure_code in (EXIT_UNSAVED, EXIT_PARTIAL, EXIT_UNKNOWN) else ""


def deferred_task(entry: Entry, batch: Batch) -> tuple[Task, Plan]:
    """Return a deferred job as its journal line has it, whatever the jobs file says by now."""
    line = line_at(entry.place)
    fields = {**part(line, "fields", dict), "prompt": part(line, "prompt", str)}
    command = "edit" if line.get("command") == "edit" else "generate"
    request = Request(command, ENDPOINTS[command], tuple(fields.items()))
    output, name = part(line, "output", str) or None, entry.identity
    plan = Plan(-1, entry.id, name, entry.line, output, command, entry.estimate)
    plan = batch.plan_of.get(name, plan)._replace(id=entry.id, number=entry.number, output=output)
    console, keeper = JobConsole(batch.console, plan.name), JobKeeper(batch, kept_part(line))
    session = batch.session._replace(console=console, keeper=keeper)
    return Task(request, batch.target(plan, request), batch.settings, session), plan


################################################################################
# Gallery
################################################################################
# index.html in a batch's folder: what its journals say, to be looked at in a browser.

GALLERY = "index.html"
GALLERY_HEAD = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --card: #fff; --page: #f3f3f0; --ink: #222; --dim: #6b6b6b;
  --bad: #b3261e; --none: #e4e4e0 }}
@media (prefers-color-scheme: dark) {{ :root {{ --card: #222326; --page: #151618; --ink: #e8e8e6;
  --dim: #9a9a98; --bad: #ff8a80; --none: #2c2d31 }} }}
body {{ margin: 0; padding: 1.5rem; background: var(--page); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif }}
h1 {{ margin: 0; font-size: 1.3rem; overflow-wrap: anywhere }}
header p {{ margin: .2rem 0 1.5rem; color: var(--dim) }}
header a {{ color: var(--bad) }}
main {{ display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)) }}
figure {{ margin: 0; background: var(--card); border-radius: 8px; overflow: hidden;
  content-visibility: auto; contain-intrinsic-size: 240px 340px }}
img {{ display: block; width: 100%; aspect-ratio: 1; object-fit: contain; background: var(--none) }}
.none {{ aspect-ratio: 1; background: var(--none); color: var(--bad); padding: 1rem;
  box-sizing: border-box; overflow: auto; overflow-wrap: anywhere }}
figcaption {{ padding: .6rem .8rem .8rem; overflow-wrap: anywhere }}
.prompt {{ display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 4;
  overflow: hidden }}
small {{ display: block; margin-top: .3rem; color: var(--dim) }}
</style>
<header><h1>{title}</h1><p>{totals}</p></header>
<main>
"""


class Gallery:
    """Writes a batch's page anew as jobs finish, but not so often that it slows them."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.written = 0  # jobs ended when it was written last
        self.next = time.monotonic() + 2

    def refresh(self) -> None:
        """Write the page, if jobs have ended since and it is time to."""
        started = time.monotonic()
        if self.batch.ended > self.written and started >= self.next:
            self.written = self.batch.ended
            write_gallery(self.batch)
            self.next = time.monotonic() + max(2.0, 20 * (time.monotonic() - started))


def write_gallery(batch: Batch) -> None:
    """Write the page of a batch's folder, whole or not at all; a fault is a warning."""
    path = os.path.join(batch.folder, GALLERY)
    temporary = f"{path}.{os.urandom(4).hex()}.part"
    try:
        entries = read_journals(journals_in(batch.folder), batch.settings.sandbox)
        rows = sorted(entries.values(), key=lambda entry: (entry.number, entry.place))
        private_file(temporary)
        with open(temporary, "w", encoding="utf-8", errors="replace") as file:
            file.writelines(gallery_parts(os.path.basename(batch.folder), batch.folder, rows))
        open_to_others(temporary, batch.session.mode)
        os.replace(temporary, path)
    except OSError as error:
        remove_file(temporary)
        batch.console.warn(f"cannot write {path}: {os_reason(error)}")


def gallery_parts(title: str, folder: str, rows: list[Entry]) -> Iterator[str]:
    """Yield the page piece by piece; everything from outside is escaped."""
    from html import escape

    saved = sum(entry.state == SAVED for entry in rows)
    lacking = [entry.id for entry in rows if entry.state != SAVED]
    links = [f'<a href="#{escape(name)}">{escape(name)}</a>' for name in lacking[:50]]
    more = f" and {len(lacking) - 50} more" if len(lacking) > 50 else ""
    totals = f"{saved} of {plural(len(rows), 'job')} saved"
    totals += f"; not whole: {' '.join(links)}{more}" if lacking else ""
    yield GALLERY_HEAD.format(title=escape(title), totals=totals)
    for entry in rows:
        yield from gallery_figures(line_at(entry.place), folder)
    yield "</main>\n</html>\n"


def gallery_figures(line: dict[str, Any], folder: str) -> Iterator[str]:
    """Yield a figure for each picture of a job, or one that says why there is none."""
    from html import escape

    prompt, name = escape(part(line, "prompt", str)), escape(part(line, "id", str))
    amount, seconds = part(part(line, "cost", dict), "amount", float), part(line, "seconds", float)
    price = str(Cost(amount, part(line["cost"], "currency", str))) if amount else ""
    figures = []
    for picture in part(line, "images", list):
        link = escape(relative_link(part(picture, "path", str), folder))
        size = f"{part(picture, 'width', int)}x{part(picture, 'height', int)}"
        image = f'<a href="{link}"><img loading="lazy" src="{link}" alt="{prompt}"></a>'
        figures.append((image, size))
    if not figures:
        why = part(part(line, "error", dict), "message", str)
        text = escape(f"{part(line, 'state', str)}: {why}" if why else "under way")
        figures = [(f'<div class="none">{text}</div>', "")]
    for image, size in figures:
        words = (name, size, escape(price), f"{seconds:.1f} s" if seconds else "")
        told = " · ".join(word for word in words if word)
        caption = f'<span class="prompt" title="{prompt}">{prompt}</span><small>{told}</small>'
        yield f'<figure id="{name}">{image}<figcaption>{caption}</figcaption></figure>\n'


def relative_link(path: str, folder: str) -> str:
    """Return the link from the page to a picture; one in its folder stays good when that moves."""
    from urllib.parse import quote

    inside = os.path.dirname(path) == folder
    try:
        where = os.path.basename(path) if inside else os.path.relpath(path or folder, folder)
    except ValueError:  # another drive
        return "file:///" + quote(path.replace(os.sep, "/"))
    return quote(where.replace(os.sep, "/").encode("utf-8", "surrogateescape"))


################################################################################
# Sandbox
################################################################################
# A local server that answers like the API in force, with pictures that are plainly placeholders.

# The letters are 5 x 7 dots: seven base-32 digits each, one per row from the top, whose five bits
# are the dots of that row from left to right ("h" is 10001, "v" is 11111).
GLYPH_CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'\"-+*/()&#%@=×… "
GLYPHS = """
    fhhvhhh uhhuhhu fgggggf uhhhhhu vggsggv vggsggg fggjhhf hhhvhhh e44444e 72222ic hikokih ggggggv
    hrllhhh hhpljhh ehhhhhe uhhhugg ehhhlid uhhukih fgge11u v444444 hhhhhhe hhhhaa4 hhhllla hha4ahh
    hhha444 v1248gv ehjlphe 4c4444e eh168gv u11e11u 26aiv22 vgu11he fgguhhe v112444 ehhehhe ehhf11u
    0000066 0000448 0660660 0440448 4444404 eh12404 4480000 aaa0000 000e000 044v440 0level0 112488g
    2488842 8422248 8kk8lid aavavaa pp248jj ehnlngf 00v0v00 00a4a00 000000l 0000000
"""
HOLLOW_BOX = "0vhhhv0"  # stands for every character that the font lacks


class Canvas:
    """The rows of an RGB picture, each led by its PNG filter byte, on a diagonal gradient."""

    def __init__(self, width: int, height: int, hue: int) -> None:
        self.width, self.height = width, height
        self.stride = 1 + 3 * width
        self.font = dict(zip(GLYPH_CHARACTERS, GLYPHS.split()))
        strip = gradient(width + height, hue)
        rows = (b"\0" + strip[3 * y : 3 * (y + width)] for y in range(height))
        self.data = bytearray().join(rows)

    def lighten(self, x: int, y: int, width: int, height: int, tint: bytes) -> None:
        """Map the colours of a rectangle through the 256 values of `tint`."""
        for row in range(y, y + height):
            start = row * self.stride + 1 + 3 * x
            stop = start + 3 * width
            self.data[start:stop] = self.data[start:stop].translate(tint)

    def disc(self, x: int, y: int, radius: int, tint: bytes) -> None:
        """Lighten the part of a disc around (x, y) that lies on the canvas."""
        for row in range(max(0, y - radius), min(self.height, y + radius)):
            half = round((radius**2 - (row - y) ** 2) ** 0.5)
            left, right = max(0, x - half), min(self.width, x + half)
            self.lighten(left, row, max(0, right - left), 1, tint)

    def frame(self, margin: int, line: int, tint: bytes) -> None:
        """Draw a rectangle of thin lines, `margin` pixels inside the edge."""
        across, down = self.width - 2 * margin, self.height - 2 * margin
        for y in (margin, self.height - margin - line):
            self.lighten(margin, y, across, line, tint)
        for x in (margin, self.width - margin - line):
            self.lighten(x, margin + line, line, down - 2 * line, tint)

    def text(self, text: str, y: int, dot: int, tint: bytes) -> None:
        """Write one centred line, its top at `y`, with dots of `dot` x `dot` pixels."""
        left = (self.width - (6 * len(text) - 1) * dot) // 2
        for index, character in enumerate(text):
            for row, digit in enumerate(self.font.get(character, HOLLOW_BOX)):
                for column, bit in enumerate(f"{int(digit, 32):05b}"):
                    if bit == "1":
                        x = left + (6 * index + column) * dot
                        self.lighten(x, y + row * dot, dot, dot, tint)


def gradient(length: int, hue: int) -> bytes:
    """Return `length` RGB pixels that drift from a deep tone to a lighter neighbouring hue."""
    from colorsys import yiq_to_rgb
    from math import cos, pi, radians, sin

    pixels = bytearray()
    for index in range(length):
        ease = (1 - cos(pi * index / length)) / 2
        angle = radians(hue + 70 * ease)
        # In YIQ the brightness does not hang on the hue: white text is legible on all of them.
        rgb = yiq_to_rgb(0.27 + 0.13 * ease, 0.14 * cos(angle), 0.14 * sin(angle))
        pixels += bytes(round(255 * channel) for channel in rgb)
    return bytes(pixels)


def white_tint(opacity: float) -> bytes:
    """Return the table that lays white of the given opacity over a colour channel."""
    return bytes(round(value + (255 - value) * opacity) for value in range(256))


def wrap_words(prompt: str, columns: int) -> list[str]:
    """Return the first words of the prompt as at most three lines."""
    from textwrap import wrap

    words = " ".join(prompt.upper().split())
    return wrap(words[: 4 * columns], columns, max_lines=3, placeholder="…")


def write_words(canvas: Canvas, prompt: str) -> None:
    """Write the title, the size and the prompt as one block in the middle of the canvas."""
    width, height = canvas.width, canvas.height
    dot = min(width // 60, height // 44)  # of the title; it leaves room for all the rest
    small = dot // 4
    lines = [("SANDBOX", dot, 0, 0.96), (f"{width}×{height}", (dot + 2) // 3, 2 * dot, 0.8)]
    if small:
        for line in wrap_words(prompt, width * 4 // 5 // (6 * small)):
            lines.append((line, small, 4 * small if len(lines) > 2 else 4 * dot, 0.9))
    y = (height - sum(7 * size + gap for _, size, gap, _ in lines)) // 2
    for text, size, gap, opacity in lines:
        canvas.text(text, y + gap, size, white_tint(opacity))
        y += gap + 7 * size


def paint_placeholder(width: int, height: int, prompt: str, shade: int = 0) -> bytes:
    """Return a PNG placeholder of the given size whose colours follow the prompt and `shade`."""
    from zlib import crc32

    seed = crc32(prompt.encode("utf-8", "replace")) + 136 * shade
    canvas = Canvas(width, height, seed % 220 - 10)  # the hues left out are the olive ones
    short = min(width, height)
    canvas.disc(width * 4 // 5, height // 5, short * 2 // 5, white_tint(0.05))
    canvas.disc(width // 6, height * 7 // 8, short // 2, white_tint(0.04))
    if short >= 48:
        canvas.frame(short // 24, 1 + short // 500, white_tint(0.4))
    write_words(canvas, prompt)
    return encode_png(width, height, 2, [bytes(canvas.data)], 1)


class SandboxRequest(NamedTuple):
    """One POST to the sandbox: the endpoint, its fields, and the first image's size."""

    endpoint: str
    fields: dict[str, Any]
    first_size: tuple[int, int] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """The size of its pictures: the one asked for, or the nearest legal one."""
        size = parse_size(str(self.fields.get("size", "auto"))) or self.first_size or (1024, 1024)
        return nearest_size(*size) if size_fault(*size) else size


def read_sandbox_request(path: str, content_type: str, body: bytes) -> SandboxRequest:
    """Return what a POST asks for, from JSON or multipart. Raises ValueError for neither."""
    endpoint = path.rpartition("/")[2]
    if not content_type.startswith("multipart/"):
        fields = json.loads(body)
        if not isinstance(fields, dict):
            raise ValueError("the body is not a JSON object")
        return SandboxRequest(endpoint, fields)
    from email import message_from_bytes
    from io import BytesIO

    message = message_from_bytes(b"Content-Type: " + content_type.encode() + b"\r\n\r\n" + body)
    fields, first_size = {}, None
    for part in message.get_payload() if message.is_multipart() else []:
        name = str(part.get_param("name", "", "content-disposition"))  # type: ignore[union-attr]
        data = part.get_payload(decode=True)  # type: ignore[union-attr]
        assert isinstance(data, bytes)
        info = inspect_picture(BytesIO(data)) if name.startswith("image") else None
        if info and not first_size:
            first_size = (info.width, info.height)
        fields[name] = "" if info else data.decode("utf-8", "replace")
    return SandboxRequest(endpoint, fields, first_size)


def sandbox_refusal(
    request: SandboxRequest, provider: Provider
) -> tuple[int, dict[str, Any]] | None:
    """Return the error that the provider would answer with, or None: unknown fields, bad sizes."""
    fields = request.fields
    known = {
        field.name.partition(".")[0] for field in FIELDS if request.endpoint[0] in field.endpoints
    }
    known |= {"prompt", "stream", "partial_images", "image", "mask", "markup"}
    if provider.strict:
        known.discard("response_format")
        for name in fields:
            if name.partition("[")[0] not in known:
                return api_error(400, f"Unknown parameter: '{name}'.", "unknown_parameter", name)
    if not str(fields.get("prompt") or "").strip():
        return api_error(
            400, "Missing required parameter: 'prompt'.", "missing_parameter", "prompt"
        )
    if request.endpoint == "edits" and not request.first_size and "images" not in fields:
        return api_error(400, "Missing required parameter: 'image'.", "missing_parameter", "image")
    try:
        size = parse_size(str(fields.get("size", "auto")))
    except ValueError:
        size = (0, 0)
    fault = size_fault(*size) if size else ""
    if fault:
        return api_error(400, f"Invalid size: {fault}.", "invalid_value", "size")
    if not re.fullmatch("[1-9]|10", str(fields.get("n", 1))):
        return api_error(400, "Invalid n: it is 1 to 10.", "invalid_value", "n")
    return None


def api_error(status: int, message: str, code: str, param: str = "") -> tuple[int, dict[str, Any]]:
    """Return an error as the API answers it."""
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    return status, {"error": error}


def sandbox_answer(
    request: SandboxRequest, provider: Provider, origin: str, stored: dict[str, bytes]
) -> tuple[int, dict[str, Any]]:
    """Return (status, JSON) for a POST, as the provider in force answers; links go to `stored`."""
    from binascii import b2a_base64

    refused = sandbox_refusal(request, provider)
    if refused:
        return refused
    kind = request.fields.get("response_format") or ("url" if provider.answers_url else "b64_json")
    data, prompt = [], str(request.fields["prompt"])
    for shade in range(int(request.fields.get("n", 1))):
        picture = paint_placeholder(*request.size, prompt, shade)
        if kind == "url":
            name = f"/pictures/{os.urandom(8).hex()}.png"
            stored[name] = picture
            data.append({"url": origin + name})
        else:
            data.append({"b64_json": b2a_base64(picture, newline=False).decode("ascii")})
    text_tokens = len(prompt) // 4 + 1
    usage = {"input_tokens": text_tokens, "output_tokens": 0, "total_tokens": text_tokens}
    return 200, {"created": int(time.time()), "data": data, "output_format": "png", "usage": usage}


def sandbox_events(request: SandboxRequest, answer: dict[str, Any]) -> bytes:
    """Return an answer as an event stream, each picture after its partial images."""
    from binascii import b2a_base64

    kind = "image_edit" if request.endpoint == "edits" else "image_generation"
    events = []
    for entry in answer["data"]:
        for index in range(int(request.fields.get("partial_images") or 0)):
            picture = paint_placeholder(*request.size, f"partial {index + 1}", index + 3)
            data = b2a_base64(picture, newline=False).decode("ascii")
            partial = {"type": f"{kind}.partial_image", "partial_image_index": index}
            events.append({**partial, "b64_json": data})
        events.append({"type": f"{kind}.completed", **entry, "usage": answer["usage"]})
    lines = [f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events]
    return "".join(lines).encode("ascii")


def make_sandbox(provider: Provider, port: int) -> Any:
    """Return an HTTP server on loopback that answers like the API; port 0 takes a free one."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    stored: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        """Hands requests to sandbox_answer and sends what it says."""

        def do_GET(self) -> None:
            if self.path.endswith("/models"):
                self.send_json(200, {"object": "list", "data": [{"id": name} for name in MODELS]})
            elif self.path in stored:
                self.send_body(200, "image/png", stored[self.path])
            else:
                self.send_json(*api_error(404, f"Not found: {self.path}", "not_found"))

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if not self.path.endswith(("/images/generations", "/images/edits")):
                self.send_json(*api_error(404, f"Not found: {self.path}", "not_found"))
                return
            try:
                asked = read_sandbox_request(self.path, self.headers["Content-Type"] or "", body)
            except ValueError as error:
                self.send_json(*api_error(400, f"Unreadable request: {error}", "invalid_request"))
                return
            origin = f"http://{self.headers['Host']}"
            try:
                status, answer = sandbox_answer(asked, provider, origin, stored)
            except (TypeError, ValueError) as error:
                status, answer = api_error(400, f"Invalid value: {error}", "invalid_value")
            if status == 200 and str(asked.fields.get("stream", "")).lower() == "true":
                self.send_body(200, "text/event-stream", sandbox_events(asked, answer))
            else:
                self.send_json(status, answer)

        def send_json(self, status: int, value: dict[str, Any]) -> None:
            self.send_body(status, "application/json", json.dumps(value).encode("ascii"))

        def send_body(self, status: int, content_type: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Keep quiet: the terminal belongs to the call that started us."""

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def start_sandbox(settings: Settings) -> Settings:
    """Start the sandbox for this call alone and return the settings that lead to it."""
    from threading import Thread

    server = make_sandbox(settings.provider, 0)
    Thread(target=server.serve_forever, daemon=True).start()
    base = parse_base_url(f"http://127.0.0.1:{server.server_address[1]}/v1")
    return settings._replace(base=base, key=None, sandbox=True, headers=())


################################################################################
# Commands
################################################################################
# One function a command, each the pipeline told once.


def command_image(args: Args, session: Session) -> int:
    """generate and edit: from the command line to pictures on disk."""
    console = session.console
    settings = resolve_settings(args, console)
    request = build_request(ask_from_args(args, settings), settings, console)
    target = plan_target(args.output, args.output_dir, request, settings, bool(args.force))
    if target.stdout and console.json:
        raise Failure("-o - and --json both want standard output; pass one of them")
    console.stdout_is_data = target.stdout and not args.dry_run
    if target.stdout and args.sidecar:
        raise Failure("-o - leaves no file that --sidecar could lie beside")
    check_target(target, bool(args.sidecar))
    if args.dry_run:
        return show_dry_run(Task(request, target, settings, session))
    check_connection(settings)
    if settings.sandbox:
        settings = start_sandbox(settings)
    return report(perform(Task(request, target, settings, session)), console)


def command_batch(args: Args, session: Session) -> int:
    """batch: many jobs from a file; the same command again goes on where it stopped."""
    started = time.monotonic()
    if len(args.words) != 1:
        raise Failure("batch takes one jobs file, or - for standard input")
    if (args.wait or args.cancel) and not args.deferred:
        raise Failure("--wait and --cancel are for --deferred")
    if args.deferred and args.sandbox:
        raise Failure("the sandbox has no Batch API; leave out --deferred")
    settings = resolve_settings(args, session.console)
    if args.deferred:
        settings = settings._replace(discount=DEFERRED_PRICE)
    batch = Batch(args, settings, session, read_jobs_file(args.words[0]))
    if args.dry_run:
        plan_batch(batch)
        return show_batch(batch)
    check_connection(settings)
    lock = lock_batch(batch) if os.path.isdir(batch.folder) else None
    entries = plan_batch(batch)
    find_curl()
    prepared = []
    if args.deferred:
        check_deferred(batch)
        if lock and sweep_deferred(batch):
            entries = plan_batch(batch)
        prepared = prepare_deferred(batch)
    check_folder(batch.folder)
    if not lock:
        os.makedirs(batch.folder, exist_ok=True)
        lock = lock_batch(batch)
        if os.path.exists(batch.journal.path):
            raise Failure("another run of this batch has just begun", hint="wait for it to end")
    begin_batch(batch, entries)
    rows: list[dict[str, Any]] = []
    if args.deferred:
        rows = run_deferred(prepared, batch)
    else:
        run_workers(batch)
    if rows:
        more = {"deferred": rows, "folder": batch.folder, "journal": batch.journal.path}
        return emit_document("batch", more, session.console)
    journals = [batch.journal.path, *journals_in(batch.folder)]
    if changed_at(os.path.join(batch.folder, GALLERY)) <= max(map(changed_at, journals)):
        write_gallery(batch)
    return report_batch(batch, time.monotonic() - started)


def plan_batch(batch: Batch) -> dict[str, Entry]:
    """Check every job and decide what is to be done; return what the journals say."""
    entries = read_journals(journals_in(batch.folder), batch.settings.sandbox)
    seen: dict[str, int] = {}
    plans = check_jobs(batch, entries, seen)
    batch.plans = match_plans(plans, entries, batch, claimed_numbers(batch, seen))
    batch.plan_of = {plan.identity: plan for plan in batch.plans}
    capped = batch.args.max_cost is not None and not batch.settings.sandbox
    for plan in batch.plans:
        if plan.send and plan.entry and plan.entry.state == DEFERRED and not batch.args.deferred:
            hint = "--deferred fetches it, --deferred --cancel ends that"
            raise Failure(f"{plan.name} is in a batch at the server, which costs", hint=hint)
        if capped and plan.send and not plan.estimate:
            line = batch.jobs.place(plan.row)
            raise Failure(f"{line}: no price is known for it, so --max-cost can't be kept")
    for plan in batch.plans:
        state = plan.entry.state if plan.entry else LEFT
        batch.states[plan.row] = LEFT if plan.send else "skipped" if state == SAVED else state
        batch.codes[plan.row] = plan.entry.exit_code if plan.entry and not plan.send else 0
    billed = [entry for entry in entries.values() if entry.state in (SENT, UNKNOWN, DEFERRED)]
    batch.spent = sum(entry.spent for entry in entries.values())
    batch.spent += sum(entry.estimate for entry in billed)
    return entries


def begin_batch(batch: Batch, entries: dict[str, Entry]) -> None:
    """Make ready for the workers: jobs to look for first, the journal's word on what is redone."""
    session = batch.session._replace(part=f"{os.path.basename(batch.stem)}-")
    for name in list_folder(batch.folder):
        if name.startswith(f".{PROGRAM}-{session.part}") and name.endswith(".part"):
            remove_file(os.path.join(batch.folder, name))  # of a run that was killed
    batch.folders = left_folders(batch, entries)
    if batch.settings.sandbox:
        batch.settings = start_sandbox(batch.settings)
    looks = [plan for plan in batch.plans if plan.look]
    sends = [plan for plan in batch.plans if plan.send and not plan.look]
    if looks or sends:
        root = open_jobs_folder(batch.console, batch.args.concurrency)
        session = session._replace(root=root)
    batch.session = session
    for plan in sends:
        if plan.entry and plan.entry.state in PAID_STATES and not plan.entry.redo:
            batch.journal.add({"state": REDO, **batch.entry(plan), "job_id": plan.entry.job_id})
    batch.queue = [*reversed(sends), *reversed(looks)]


def command_recover(args: Args, session: Session) -> int:
    """recover: list unfinished answers, save the pictures in some, or clean up."""
    if args.clean:
        return clean_jobs(args, session.console)
    folders = list_jobs(strict=True)
    if args.words or args.last or args.all:
        chosen = choose_jobs(args, folders)
        settings = resolve_settings(args, session.console)
        outcomes = [recover_job(folder, args, settings, session) for folder in chosen]
        return report_recovered(outcomes, session.console)
    rows = [job_row(folder) for folder in folders]
    if session.console.json:
        return emit_document("recover", {"jobs": rows}, session.console)
    if rows:
        for row in rows:
            prompt = printable(row["prompt"], 50)
            session.console.emit(f"{row['id']}  {row['state']:22}  {row['command']}  {prompt}")
    else:
        session.console.say("no unfinished answers")
    return EXIT_OK


def choose_jobs(args: Args, folders: list[str]) -> list[str]:
    """Return the job folders that the command line names. Raises Failure for one unknown."""
    if args.all:
        return folders
    if args.last:
        if not folders:
            raise Failure("there are no unfinished answers", EXIT_UNSAVED)
        return folders[-1:]
    chosen = []
    for word in args.words:
        found = [folder for folder in folders if os.path.basename(folder) == word]
        if not found:
            raise Failure(
                f"there is no job {word!r}", EXIT_UNSAVED, hint="recover --list shows all"
            )
        chosen += found
    return chosen


def job_row(folder: str) -> dict[str, Any]:
    """Return what the list shows of one job."""
    record = read_record(folder) or {}
    job = take_job(folder)
    size = job.answer_size() if job else 0
    state = f"answer, {size // 1024 + 1} KB" if size else "no answer"
    if job is None or curl_lives(job):
        state = "under way"
    if job:
        job.lock.close()
    fields = dict(record.get("fields") or [])
    return {
        "id": os.path.basename(folder),
        "state": state,
        "command": str(record.get("command", "?")),
        "prompt": str(fields.get("prompt", "")),
        "bytes": size,
        "folder": folder,
    }


def recover_job(folder: str, args: Args, settings: Settings, session: Session) -> Outcome:
    """Save the pictures in one job's answer. Never POSTs."""
    job_id = os.path.basename(folder)
    empty = Outcome("recover", job_id=job_id)
    job, record = take_job(folder), read_record(folder)
    if not job or not record:
        why = "is under way in another process" if os.path.isdir(folder) else "is gone"
        if job:
            job.lock.close()
            why = f"has no record that can be read; what came is in {folder}"
        return empty._replace(failure=Failure(f"job {job_id} {why}", EXIT_UNSAVED))
    if args.no_wait and curl_lives(job):
        job.lock.close()
        failure = Failure(f"job {job_id}: its curl still runs", EXIT_UNSAVED, hint="wait for it")
        return empty._replace(failure=failure, recover_id=job_id)
    try:
        session = session._replace(keeper=recover_keeper(record, session.console))
        task = recovered_task(record, args, settings, session)
    except Failure as fault:
        job.lock.close()
        return empty._replace(failure=fault, recover_id=job_id)
    if record.get("status") != "set aside":
        set_status(job, RECOVERING)
    try:
        end = await_curl(job, Watch(job.path(ANSWER)), session.console)
        answer = read_answer(job, end, task, salvage=True)
    except Interrupted as stop:
        failure = stopped(stop.number, bool(job.answer_size()))
        return settle(job, empty._replace(failure=failure), task)
    try:
        outcome = finish_job(job, empty._replace(request=task.request, answer=answer), task)
    except Failure as fault:  # its batch's journal can't be written, so the job stays
        job.lock.close()
        fault.exit_code, fault.hint = EXIT_UNSAVED, "mend that and recover it again"
        return empty._replace(failure=fault, recover_id=job_id)
    return outcome._replace(failure=recover_failure(outcome))


class RecoverKeeper(Keeper):
    """Tells the journal of the batch that a recovered job belongs to."""

    def __init__(self, journal: Journal, entry: dict[str, Any]) -> None:
        self.journal, self.entry = journal, entry

    def done(self, job: Job, outcome: Outcome) -> None:
        """Put on record what came of it; an outcome that stays unknown is there already."""
        if state_of(outcome) != UNKNOWN and os.path.isdir(os.path.dirname(self.journal.path)):
            self.journal.tell(outcome, self.entry, job.id)


def recover_keeper(record: dict[str, Any], console: Console) -> Keeper:
    """Return who is told of a recovered job: the journal of its batch, if it had one."""
    mark = record.get("batch")
    if not isinstance(mark, dict) or not isinstance(mark.get("entry"), dict):
        return Keeper()
    return RecoverKeeper(Journal(str(mark.get("journal")), console), mark["entry"])


def recovered_task(
    record: dict[str, Any], args: Args, settings: Settings, session: Session
) -> Task:
    """Return a job's request, target and settings as its record tells them."""
    fields = tuple((name, value) for name, value in record["fields"])
    request = Request(record["command"], record["endpoint"], fields)
    target = read_target(record)._replace(stdout=False, force=bool(args.force))
    try:
        base = parse_base_url(record["base_url"])
    except ValueError:
        raise Failure("the job's base URL is broken; its answer is kept", EXIT_UNSAVED) from None
    if args.output is not None or args.output_dir is not None:
        target = plan_target(args.output, args.output_dir, request, settings, bool(args.force))
        check_target(target)
    if base.origin != settings.base.origin:
        settings = settings._replace(key=None)
    sandbox = bool(record.get("sandbox"))
    provider = PROVIDERS.get(str(record.get("provider")), find_provider(base.host))
    settings = settings._replace(base=base, provider=provider, sandbox=sandbox)
    return Task(request, target, settings, session)


def recover_failure(outcome: Outcome) -> Failure | None:
    """Return recover's failure: exit 10 where nothing was saved, 9 where something was."""
    failure = outcome.failure
    if not failure or failure.exit_code > 128:
        return failure
    exit_code = EXIT_PARTIAL if outcome.pictures else EXIT_UNSAVED
    message, hint = failure.message, failure.hint
    if not outcome.pictures:
        message = f"job {outcome.job_id}: nothing could be saved: {message}"
        hint = "recover --clean removes it; the same command with --new sends another"
    recovered = Failure(message, exit_code, code=failure.code, hint=hint)
    recovered.maybe_billed, recovered.http_status = failure.maybe_billed, failure.http_status
    return recovered


def report_recovered(outcomes: list[Outcome], console: Console) -> int:
    """Print what one or many recovered jobs came to; one JSON document in either case."""
    if len(outcomes) == 1:
        return report(outcomes[0], console)
    codes = set()
    documents = [outcome_document(outcome, console) for outcome in outcomes]
    for outcome in outcomes:
        codes.add(outcome.failure.exit_code if outcome.failure else EXIT_OK)
        if outcome.failure:
            console.error(f"{PROGRAM}: {outcome.failure}")
    failure = None
    if codes - {EXIT_OK}:
        exit_code = EXIT_UNSAVED if codes == {EXIT_UNSAVED} else EXIT_PARTIAL
        failure = Failure("not every job could be recovered", exit_code)
    if console.json:
        console.document({**base_document("recover", failure, console), "jobs": documents})
    return failure.exit_code if failure else EXIT_OK


def clean_jobs(args: Args, console: Console) -> int:
    """Remove the jobs that are older than --older-than and that nobody works on."""
    oldest = job_stamp(time.time() - args.older_than)
    removed = []
    for folder in list_jobs(strict=True):
        job = take_job(folder) if os.path.basename(folder)[:16] <= oldest else None
        if job and not curl_lives(job):
            remove_job(job)
            removed.append(job.id)
        elif job:
            job.lock.close()
    console.say(f"removed {len(removed)} jobs")
    return emit_document("recover", {"removed": removed}, console)


def read_history(oldest: float) -> list[dict[str, Any]]:
    """Return the history's entries since a time in seconds, oldest first; torn lines are passed.

    Lines of one job are one entry: what recover brought out lies over what the call had said.
    """
    found: dict[str, dict[str, Any]] = {}
    try:
        for offset, value in read_lines(os.path.join(state_root(), HISTORY)):
            if isinstance(value.get("time"), str):
                entry, job_id = sound_entry(value), str(value.get("job_id") or offset)
                before = found.get(job_id, {"paths": [], "cost": None})
                paths = dict.fromkeys(before["paths"] + entry["paths"])
                cost = entry["cost"] or before["cost"]
                found[job_id] = {**entry, "paths": list(paths), "cost": cost}
    except Failure:
        pass  # one that can't be read is none
    stamp = utc_text(oldest)
    entries = [entry for entry in found.values() if entry["time"] >= stamp]
    return sorted(entries, key=lambda entry: str(entry["time"]))


def sound_entry(value: dict[str, Any]) -> dict[str, Any]:
    """Return a line of the history with its cost and paths in the form that we know."""
    cost, paths = part(value, "cost", dict), part(value, "paths", list)
    amount, currency = cost.get("amount"), cost.get("currency")
    known = isinstance(amount, (int, float)) and isinstance(currency, str)
    cost = {"amount": amount, "currency": currency, "estimated": False} if known else None
    return {**value, "cost": cost, "paths": [path for path in paths if isinstance(path, str)]}


def history_totals(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return pictures and money by model and currency."""
    totals: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in entries:
        cost = entry.get("cost") or {}
        key = (str(entry.get("model")), str(cost.get("currency", "")))
        row = totals.setdefault(
            key, {"model": key[0], "currency": key[1], "calls": 0, "pictures": 0, "amount": 0.0}
        )
        row["calls"] += 1
        row["pictures"] += len(entry["paths"])
        row["amount"] += cost.get("amount") or 0.0
    return [totals[key] for key in sorted(totals)]


def plural(number: int, word: str) -> str:
    """Return `1 call`, `2 calls`."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def command_history(args: Args, session: Session) -> int:
    """history: what was made and what it cost."""
    console = session.console
    if args.clear:
        remove_file(os.path.join(state_root(), HISTORY))
        console.say("the history is empty now")
        return emit_document("history", {"entries": [], "totals": []}, console)
    entries = read_history(time.time() - args.since if args.since else 0)
    entries = entries[-args.limit :] if args.limit else entries
    totals = history_totals(entries)
    if console.json:
        return emit_document("history", {"entries": entries, "totals": totals}, console)
    for entry in entries:
        cost = entry.get("cost")
        words = [
            entry["time"],
            entry.get("model"),
            entry.get("size") or "-",
            entry.get("quality") or "-",
        ]
        price = str(Cost(**cost)) if cost else "-"
        price += " batch" if entry.get("price") == "batch" else ""
        prompt = printable(str(entry.get("prompt")), 40)
        line = f"{'  '.join(map(str, words))}  {len(entry['paths'])}  {price}  {prompt}"
        console.emit(UNPRINTABLE.sub(" ", line))
    for row in totals:
        price = f", {Cost(row['amount'], row['currency'])}" if row["currency"] else ""
        counts = f"{plural(row['pictures'], 'picture')} in {plural(row['calls'], 'call')}"
        console.emit(UNPRINTABLE.sub(" ", f"total {row['model']}: {counts}{price}"))
    return EXIT_OK


def emit_document(command: str, more: dict[str, Any], console: Console) -> int:
    """Print a command's JSON document, where --json asks for one."""
    if console.json:
        console.document({**base_document(command, None, console), **more})
    return EXIT_OK


def command_sizes(args: Args, session: Session) -> int:
    """sizes: the table, or what each spelling resolves to."""
    console, rows = session.console, []
    for word in args.words:
        try:
            size = parse_size(word)
        except ValueError as error:
            raise Failure(str(error)) from None
        fault = size_fault(*size) if size else ""
        if size and fault:
            close = size_text(nearest_size(*size))
            if not args.nearest_size:
                raise Failure(f"size {size_text(size)}: {fault}; the nearest legal is {close}")
            size = nearest_size(*size)
        rows.append({"spelling": word, "size": size_text(size)})
    if console.json:
        table = [
            dict(zip(("ratio", "name", *TIERS), (*row[:2], *map(size_text, row[2:]))))
            for row in SIZES
        ]
        return emit_document("sizes", {"sizes": rows or table}, console)
    if not rows:
        console.emit(f"{'ratio':6} {'name':11} {'1K':>10} {'2K':>10} {'4K':>10}")
        for ratio, name, *sizes in SIZES:
            cells = " ".join(f"{size_text(size):>10}" for size in sizes)
            console.emit(f"{ratio:6} {name:11} {cells}")
    for row in rows:
        console.emit(row["size"])
        if row["spelling"].upper() in TIERS:
            wide = size_text(parse_size(f"16:9@{row['spelling']}"))
            console.say(f"{row['spelling']} is square; 16:9@{row['spelling']} is {wide}")
    return EXIT_OK


def command_config(args: Args, session: Session) -> int:
    """config: write, show or check the settings; spends nothing."""
    chosen = [name for name in ("init", "show", "check") if getattr(args, name)]
    if len(chosen) != 1 or args.words:
        raise Failure("config takes one of --init, --show and --check")
    if args.init:
        return init_config(args, session.console)
    settings = resolve_settings(args, session.console)
    if args.show:
        return show_config(args, settings, session.console)
    if settings.sandbox:
        settings = start_sandbox(settings)
    return check_everything(args, settings, session)


def config_template(args: Args) -> dict[str, Any]:
    """Return the settings that --init writes for a profile, or for OpenAI without one."""
    name = args.profile or "openai"
    provider, settings = PROVIDERS.get(name), {}
    if provider and name != "generic":
        settings = {"base_url": provider.base_url, "api_key_env": provider.key_env}
        settings.update(TEMPLATES.get(name, {}))
    if args.base_url:
        try:
            settings["base_url"] = parse_base_url(args.base_url).url
        except ValueError as error:
            raise Failure(f"--base-url: {error}") from None
    if not settings:
        known = ", ".join(row.name for row in PROVIDERS.values() if row.key_env)
        raise Failure(f"profile {name!r} has no template ({known})", hint="pass --base-url too")
    settings.setdefault("api_key_env", re.sub("[^A-Z0-9]", "_", name.upper()) + "_API_KEY")
    if args.api_key_env:
        settings["api_key_env"] = args.api_key_env
    return settings


def init_config(args: Args, console: Console) -> int:
    """Write a config file, or add one profile to the one there is."""
    env = dict(os.environ)
    path = find_config(args.config, env) or config_places(env)[0]
    settings, profile = config_template(args), args.profile
    exists = os.path.lexists(path)
    config = read_config(path) if exists and profile else {}
    if exists and not profile and not args.force:
        raise Failure(
            f"{path} exists", hint="pass --profile NAME to add one, --force to replace it"
        )
    if profile:
        profiles = config.setdefault("profiles", {})
        if not isinstance(profiles, dict):
            raise config_failure(f"{path}: profiles is not an object")
        if profile in profiles and not args.force:
            raise Failure(f"{path} has a profile {profile} already; pass --force to replace it")
        profiles[profile] = settings
        if not exists:
            config["profile"] = profile
    else:
        config = settings
    write_config(path, config)
    if not console.json:
        console.emit(f"Wrote: {path}")
    name = settings["api_key_env"]
    check = f"config --check --profile {profile}" if profile and exists else "config --check"
    if not env.get(name):
        console.say(f"next: export {name}=YOUR-KEY, then {check}")
    return emit_document("config", {"config_file": path}, console)


def write_config(path: str, config: dict[str, Any]) -> None:
    """Write a config file that only its owner can read, whole or not at all."""
    path = os.path.realpath(path)  # a link into somebody's dotfiles stays one
    temporary = f"{path}.{os.urandom(4).hex()}"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        private_file(temporary, text.encode("utf-8"))
        os.replace(temporary, path)
    except OSError as error:
        remove_file(temporary)
        raise Failure(f"cannot write {path}: {os_reason(error)}") from None


def shown_setting(key: str, value: Any, settings: Settings) -> Any:
    """Return a setting as it may be shown: header values and passwords masked."""
    if isinstance(value, BaseUrl):
        return value.url
    if key == "headers":
        return masked_headers(value)
    if key == "proxy" and value:
        return re.sub(r"//[^/@]*@", "//****@", value)
    if key == "provider":
        return settings.provider.name
    if key == "auth_header":
        return settings.auth_header
    return sorted(value) if key == "profiles" else value


def show_config(args: Args, settings: Settings, console: Console) -> int:
    """Print each setting, where it came from and what it hides; the key masked."""
    path = find_config(args.config, dict(os.environ))
    rows = {
        key: {
            "value": shown_setting(key, row.value, settings),
            "source": row.source,
            "hides": list(row.hides),
        }
        for key, row in settings.table.items()
    }
    rows["api_key"] = {"value": masked(settings.key), "source": settings.key_source, "hides": []}
    if console.json:
        return emit_document("config", {"config_file": path, "settings": rows}, console)
    console.emit(f"config file: {path or 'none'}")
    for key, row in rows.items():
        value = row["value"] if isinstance(row["value"], str) else json.dumps(row["value"])
        console.emit(UNPRINTABLE.sub(" ", f"{key} = {value}  ({row['source']})"))
        for hidden in row["hides"]:
            console.emit(f"  {hidden} ignored: set in {row['source']}")
    return EXIT_OK


def check_everything(args: Args, settings: Settings, session: Session) -> int:
    """Print one line for each thing that a call needs, and whether it is there."""
    import tempfile

    console = session.console
    failed: list[Failure] = []
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        steps: list[tuple[str, Callable[[], str]]] = [
            ("curl", lambda: curl_version(folder, session)),
            ("config", lambda: find_config(args.config, dict(os.environ)) or "no file"),
            ("server", lambda: f"{settings.base.url} ({settings.provider.name})"),
            ("key", lambda: check_key(settings)),
            ("state", lambda: jobs_folder(console)),
            ("models", lambda: check_models(settings, session)),
        ]
        for name, step in steps:
            try:
                line = step()
                mark = "ok"
            except Failure as failure:
                failed.append(failure)
                line, mark = str(failure), "FAILED"
            rows.append({"check": name, "ok": mark == "ok", "message": line})
            if not console.json:
                console.emit(UNPRINTABLE.sub(" ", f"{name:7} {mark:6} {line}"))
    first = failed[0] if failed else None
    if console.json:
        console.document({**base_document("config", first, console), "checks": rows})
    return first.exit_code if first else EXIT_OK


def curl_version(folder: str, session: Session) -> str:
    """Return curl's path and version. Raises Failure where there is none."""
    path = os.path.join(folder, "version.txt")
    run_curl(b"", path, session, Watch(path), ["-q", "--version"])
    with open(path, encoding="utf-8", errors="replace") as file:
        words = file.readline().split()
    return f"{find_curl()} {words[1] if len(words) > 1 else '?'}"


def check_key(settings: Settings) -> str:
    """Return where the key came from, masked. Raises Failure where one is needed."""
    check_connection(settings)
    if not settings.key:
        return "none needed here"
    return f"{masked(settings.key)} from {settings.key_source}"


def check_models(settings: Settings, session: Session) -> str:
    """Ask GET {base}/models, which costs nothing, whether server and key are good."""
    check_connection(settings)
    try:
        ask_api("models", settings, session)
    except Failure as failure:
        if failure.http_status not in (404, 405):
            raise
        return f"HTTP {failure.http_status}: reachable; the key can't be checked here"
    return "HTTP 200: reachable, the key is taken"


def command_sandbox(args: Args, session: Session) -> int:
    """sandbox: serve placeholders on loopback until it is stopped."""
    settings = resolve_settings(args, session.console)
    try:
        server = make_sandbox(settings.provider, args.port)
    except OSError as error:
        raise Failure(f"port {args.port} can't be used: {os_reason(error)}") from None
    port = server.server_address[1]
    session.console.emit(f"Sandbox: http://127.0.0.1:{port}/v1")
    session.console.say(f"answers like {settings.provider.name}; stop it with Ctrl-C")
    with SIGNALS:
        server.serve_forever()
    return EXIT_OK


def command_completion(args: Args, session: Session) -> int:
    """completion: a shell's completions, made from the table of options."""
    makers = {"bash": bash_completion, "zsh": zsh_completion, "fish": fish_completion}
    if len(args.words) != 1 or args.words[0] not in makers:
        close = nearest(" ".join(args.words), makers)
        raise Failure(f"completion takes one of bash, zsh and fish{close}")
    for line in makers[args.words[0]]():
        session.console.emit(line)
    return EXIT_OK


################################################################################
# Command line
################################################################################
# argparse fills in Args; the positional words are sorted out first, wherever they stand.

COMMANDS: dict[str, tuple[str, Callable[[Args, Session], int], str, str]] = {
    "generate": ("g", command_image, '"PROMPT" [options]', "make pictures from a prompt"),
    "edit": ("e", command_image, 'IMAGE... "PROMPT" [options]', "make pictures from pictures"),
    "batch": ("b", command_batch, "JOBS [options]", "many jobs from a file, paid for once"),
    "recover": ("r", command_recover, "[ID...] [options]", "save what an interrupted call left"),
    "history": ("h", command_history, "[options]", "what was made and what it cost"),
    "sizes": ("z", command_sizes, "[SPELLING...]", "named sizes, or what a spelling means"),
    "config": (
        "c",
        command_config,
        "--init | --show | --check",
        "write, show or check the settings",
    ),
    "sandbox": ("x", command_sandbox, "[--port P]", "a local server with placeholder pictures"),
    "completion": ("l", command_completion, "bash|zsh|fish", "completions for your shell"),
}

# What the positional words of a command may be.
WORDS = {
    "generate": "PROMPT may be - for standard input.",
    "edit": "IMAGE is a png, jpeg or webp file.",
    "batch": "JOBS is JSONL, a JSON array, or\na text with a prompt a line; - is standard input.",
    "recover": "ID is as recover lists it.",
    "sizes": "SPELLING is as -s takes it.",
}
EXAMPLES = {
    "generate": """
try it without a key:
  generate "a cat on a windowsill" --sandbox
a poster at 4K, under a name of your own:
  generate "a jazz festival poster" -s portrait@4K -o poster.png
four drafts in a folder:
  generate "a logo for a bakery" --n 4 --quality low -o drafts/
the prompt from a file, and what it would send and cost:
  generate --prompt-file prompt.txt --dry-run
""",
    "edit": """
change one picture:
  edit room.png "the same room at night"
change only a box of it (x, y, width, height in pixels):
  edit room.png "a red armchair" --mask-box 100,200,400,300
blend several:
  edit fruit/*.png "a basket of all these" -s 16:9 -o basket.png
""",
    "batch": """
a prompt a line, into the folder prompts/:
  batch prompts.txt --quality low
jobs with options of their own, at most five dollars:
  batch jobs.jsonl --max-cost 5
go on after a stop, or after lines were added:
  batch jobs.jsonl --max-cost 5
part 2 of 4, each on its own machine:
  batch jobs.jsonl --shard 2/4
at half the price, within a day; the same again fetches the pictures:
  batch jobs.jsonl --deferred
""",
    "recover": """
see what is there:
  recover
save the newest, somewhere else:
  recover --last -o rescued/
remove what is older than a month:
  recover --clean --older-than 30d
""",
    "history": """
what the last week cost:
  history --since 7d
""",
    "sizes": """
the table:
  sizes
what a spelling means:
  sizes 16:9@4K
""",
    "config": """
begin with OpenAI-HK:
  config --init --profile openai-hk
see whether everything works, without spending:
  config --check
""",
    "completion": """
in ~/.bashrc:
  eval "$(gpt-image2 completion bash)"
in ~/.zshrc, after compinit:
  eval "$(gpt-image2 completion zsh)"
for fish:
  completion fish > ~/.config/fish/completions/gpt-image2.fish
""",
    "sandbox": """
a server for a pipeline's tests:
  sandbox --port 8765
""",
}


def read_age(text: str) -> int:
    """Return seconds from a number with s, m, h or d behind it."""
    match = re.fullmatch("([0-9]{1,6})([smhd])", text)
    if not match:
        raise ValueError(f"{text!r} is not an age like 7d, 12h or 30m")
    return int(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]


def read_shard(text: str) -> tuple[int, int]:
    """Return I/N as numbers, I from 1."""
    match = re.fullmatch("([0-9]{1,5})/([0-9]{1,5})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"{text!r} is not I/N like 2/4")
    return int(match[1]), int(match[2])


def read_amount(text: str) -> float:
    """Return an amount of money in the provider's currency."""
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text):
        raise ValueError(f"{text!r} is not an amount like 5 or 0.50")
    return float(text)


def read_redo(text: str) -> str:
    """Return which jobs are to be done again: a word, or ids with commas between them."""
    if not text or "" in text.split(","):
        raise ValueError(f"{text!r} is not {', '.join(REDO_WORDS)}, or ID,ID")
    return text


# The other options: names, kind (empty: a switch), commands by their letters, group, help.
OPTIONS = """
--concurrency  | 1..100    | b    | batch      | how many jobs at once (default 4)
--rpm          | 1..100000 | b    | batch      | at most so many requests a minute (default: any)
--max-cost     | AMOUNT    | b    | batch      | begin no job that could pass it (USD or credits)
--fail-fast    |           | b    | batch      | begin no more jobs after the first that fails
--shard        | I/N       | b    | batch      | only every N-th job, from the I-th
--redo         | WHICH     | b    | batch      | do again: failed unknown changed all, or ID,...
--deferred     |           | b    | batch      | by OpenAI's Batch API: half price, within 24 h
--wait         |           | b    | batch      | with --deferred: wait until it has ended
--cancel       |           | b    | batch      | with --deferred: stop what has not been made
--param        | KEY=VALUE | geb  | image      | any other API field; dots nest; VALUE may be JSON
--nearest-size |           | gebz | image      | take the nearest legal size for one that is not
--prompt       | TEXT      | ge   | prompt     | the prompt, where it is not the argument
--prompt-file  | FILE      | ge   | prompt     | the prompt from a file; - is standard input
--image --input-image | FILE | e  | pictures   | one more picture (repeatable)
--mask         | FILE      | e    | pictures   | PNG, transparent where the first picture may change
--mask-box     | X,Y,W,H   | e    | pictures   | draw that mask: a box in the first picture
--markup       | FILE      | e    | pictures   | transparent PNG with marks on it (2.5 and 2.6)
--image-field  | auto image image[] | e | pictures | the form field of the pictures (default auto)
-o --output    | PATH      | ger  | output     | a file, a folder (or FOLDER/), or - for stdout
--output-dir   | DIR       | ger  | output     | folder for generated names (default: current)
--output-dir   | DIR       | b    | output     | folder for all (default: JOBS without its suffix)
--force        |           | gebrc | output    | replace what exists
--sidecar      |           | geb  | output     | write PICTURE.json: request, usage, cost
--preview      |           | ger  | output     | show the picture in the terminal, if it can
--dry-run      |           | geb  | output     | show request, paths and an estimate; send nothing
--list         |           | r    | jobs       | list them, as without an ID
--last         |           | r    | jobs       | the newest one
--all          |           | r    | jobs       | every one
--no-wait      |           | r    | jobs       | don't wait for a request that is under way
--clean        |           | r    | jobs       | remove old ones
--older-than   | AGE       | r    | jobs       | with --clean: how old (default 7d)
--since        | AGE       | h    | history    | only what is younger: 7d, 12h (default: all)
--limit        | 1..999999 | h    | history    | only the newest N (default: all)
--clear        |           | h    | history    | empty it
--init         |           | c    | config     | write a config, or add a --profile by name
--show         |           | c    | config     | each setting, where it came from and what it hides
--check        |           | c    | config     | try curl, key and server; spends nothing
--api-key-env  | NAME      | c    | config     | with --init: the variable that holds the key
--port         | 0..65535  | x    | sandbox    | the port (default: a free one)
--config | FILE | gebrcxh | connection | the config file (config --show names the default)
--profile      | NAME      | gebrcxh | connection | the profile in it
--provider|openai openai-hk nodekey azure generic|gebrcx|connection|whose rules (default: by host)
--base-url     | URL       | gebrc | connection | the server, up to and with /v1 (default: OpenAI)
--api-key      | KEY       | gebrc | connection | the key; anyone can see it in ps
--timeout      | SECONDS   | gebrc | connection | for the whole answer (default 600)
--connect-timeout | SECONDS | gebrc | connection | for the connection (default 20)
--retries      | 0..20     | geb  | connection | of what was surely not served (default 2)
--retry-unsafe |           | geb  | connection | resend after an unknown outcome; may pay twice
--image-field  | auto image image[] | b | connection | the form field of the pictures (default auto)
--allow-http   |           | gebrc | connection | allow a key over plain http
--allow-private |          | gebr | connection | fetch pictures from private addresses too
--new          |           | ge   | connection | send anew even if the same request is under way
--sandbox      |           | gebc | connection | a local server with placeholders; no key, no cost
--json         |           | gerczxh | messages | one JSON document on stdout
--json         |           | b    | messages   | one JSON document a job, then one for all
--quiet        |           | gebrczxh | messages | errors only on stderr
--verbose      |           | gebrczxh | messages | more on stderr
-h --help | | gebrczxhl | messages | show this
"""
LETTERS = {name: row[0] for name, row in COMMANDS.items()}
READERS: dict[str, Callable[[str], Any]] = {
    "param": read_param,
    "mask_box": read_mask_box,
    "api_key_env": read_name,
    "older_than": read_age,
    "since": read_age,
    "shard": read_shard,
    "max_cost": read_amount,
    "redo": read_redo,
}


def option_rows(command: str) -> list[tuple[str, list[str], str, str, str]]:
    """Return (group, names, kind, dest, help) of every option of a command, its own group first."""
    letter = LETTERS[command]
    rows = [
        ("image", field.option.split(), field.kind, field.dest, field.help)
        for field in FIELDS
        if letter in field.endpoints or letter == "b"
    ]
    for names, kind, commands, group, text in table_rows(OPTIONS):
        if letter in commands:
            dest = names.split()[0 if "--image" in names else -1].lstrip("-").replace("-", "_")
            rows.append((group, names.split(), kind, dest, text))
    own = {"edit": "pictures", "recover": "jobs"}.get(command, command)
    return sorted(rows, key=lambda row: (row[0] != "prompt", row[0] != own))


def option_reader(dest: str, kind: str) -> Callable[[str], Any]:
    """Return the function that reads an option's value."""
    field = next((field for field in FIELDS if field.dest == dest), None)
    if field:
        return read_as(field.name)
    if ".." in kind:
        return read_number(kind)
    if dest in READERS:
        return READERS[dest]
    checked = dest in ("timeout", "connect_timeout", "provider", "image_field")
    return SETTINGS[dest][0] if checked else str


def help_text(command: str) -> str:
    """Return a command's help, its options in groups; a test holds it equal to the README."""
    _, _, usage, summary = COMMANDS[command]
    told = f"{summary[0].upper()}{summary[1:]}. {WORDS.get(command, '')}".rstrip()
    lines = [f"usage: {PROGRAM} {command} {usage}", "", told]
    rows = [
        (title, f"  {', '.join(names)} {'|'.join(kind.split())}".rstrip(), text)
        for title, names, kind, _, text in option_rows(command)
    ]
    column = min(28, 2 + max(len(shown) for _, shown, _ in rows))
    groups: dict[str, list[str]] = {}
    for title, shown, text in rows:
        lead = f"{shown:{column}}" if len(shown) <= column - 2 else f"{shown}\n{'':{column}}"
        groups.setdefault(title, []).append(lead + text)
    for title, shown_rows in groups.items():
        lines += ["", f"{title}:", *shown_rows]
    examples = re.sub(f"(?m)^  (?={command})", f"  {PROGRAM} ", EXAMPLES[command])
    return "\n".join([*lines, "", f"examples:{examples}"]).rstrip()


def parse_arguments(argv: Sequence[str]) -> Args:
    """Return the command line as Args. Raises Failure for one that can't be right."""
    command = argv[0]
    if command not in COMMANDS:
        if command.startswith("-"):
            raise Failure(f"{command} stands before the command", hint="options come after it")
        close = nearest(command, COMMANDS)
        hint = f"to make a picture: generate {quoted(command)}" if " " in command else ""
        raise Failure(f"{command!r} is not a command ({', '.join(COMMANDS)}){close}", hint=hint)
    args, rest = Args(), list(argv[1:])
    args.command, args.words = command, []
    options = {name: row for row in option_rows(command) for name in row[1]}
    while rest:
        word = rest.pop(0)
        if word == "--":
            args.words += rest
            break
        if word == "-" or not word.startswith("-"):
            args.words.append(word)  # positional words count wherever they stand
        else:
            take_option(word, rest, options, args)
    return args


def take_option(word: str, rest: list[str], options: dict[str, Any], args: Args) -> None:
    """Put one option into Args; its value is the next word, unless that begins with a dash."""
    name, equals, value = word.partition("=") if word.startswith("--") else (word, "", "")
    if name not in options:
        raise unknown_option(name, options)
    _, names, kind, dest, _ = options[name]
    if not kind:
        if equals:
            raise Failure(f"{name} takes no value")
        setattr(args, dest, True)
        return
    if not equals:
        if not rest or (rest[0].startswith("-") and rest[0] != "-"):
            raise Failure(f"{name} needs a value", hint=f"one that begins with a dash: {name}=-…")
        value = rest.pop(0)
    try:
        found = option_reader(dest, kind)(value)
    except ValueError as error:
        raise Failure(f"{'/'.join(names)}: {error}") from None
    if dest in ("param", "image"):  # repeatable
        found = [*(getattr(args, dest) or ()), found]
    setattr(args, dest, found)


def unknown_option(option: str, known: Iterable[str]) -> Failure:
    """Return the complaint about an option, with the one that was meant."""
    if option[1] != "-" and len(option) > 2:
        hint = "a prompt that begins with a dash goes after --"
        return Failure(f"{option[:40]} is not an option", hint=hint)
    for row in table_rows(OPTIONS):
        if option in row[0].split():
            others = [name for name, letter in LETTERS.items() if letter in row[2]]
            return Failure(f"{option} is an option of {', '.join(others)}, not of this command")
    return Failure(f"{option} is not an option here{nearest(option, known)}")


def overview() -> str:
    """Return what --help shows without a command."""
    lines = [f"usage: {PROGRAM} COMMAND [options]", ""]
    lines += [f"{(__doc__ or '').splitlines()[0]}", "", "commands:"]
    lines += [f"  {name:11} {row[3]}" for name, row in COMMANDS.items()]
    lines += ["", "first picture, no key needed:"]
    lines += [f'  {PROGRAM} generate "a cat on a windowsill" --sandbox', ""]
    lines.append("stdout: a line `Saved: PATH (N KB)` for each picture. Exit codes: 0 all saved,")
    lines.append("2 and 3 nothing was sent, 8 it may be billed: run recover first.")
    return "\n".join([*lines, f"{PROGRAM} COMMAND --help shows a command's options."])


################################################################################
# Completion
################################################################################
# Scripts for bash, zsh and fish from the same tables as the parser, so that they can't drift.

SHELL_NAMES = (PROGRAM, "gpt_image2.py")
FILE_KINDS = ("FILE", "PATH", "DIR")
SIZE_WORDS = (*TIERS, *(row[1] for row in SIZES), *(row[0] for row in SIZES), "auto")
OFFERED = {"model": tuple(MODELS), "size": SIZE_WORDS, "redo": REDO_WORDS}
FILE_COMMANDS = ("edit", "batch")  # whose positional words are files
SHELL_WORDS = {"completion": "':shell:(bash zsh fish)'"}
BASH_FILES = "local IFS=$'\\n'; COMPREPLY=($(compgen -f -- \"$cur\")); return"


def offered(dest: str, kind: str) -> tuple[str, ...]:
    """Return the words that may follow an option, as far as they are known."""
    closed = " " in kind or kind.upper() != kind  # else low..high, or a word for any text
    return OFFERED.get(dest) or (tuple(kind.split()) if closed else ())


def bash_completion() -> Iterator[str]:
    """Yield bash's script: what follows the command, an option, or stands alone."""
    yield "_gpt_image2() {"
    yield '    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} words=""'
    yield "    COMPREPLY=()"
    yield '    case "${COMP_CWORD:-1} ${COMP_WORDS[1]} $prev" in'
    yield f'        "1 "*) words="{" ".join(COMMANDS)}";;'
    for command in COMMANDS:
        for _, names, kind, dest, _ in option_rows(command):
            pattern = "|".join(f'*" {command} {name}"' for name in names)
            words = " ".join(offered(dest, kind))
            if kind in FILE_KINDS:
                yield f"        {pattern}) {BASH_FILES};;"
            elif kind:
                yield f'        {pattern}) words="{words}";;'
        options = [name for row in option_rows(command) for name in row[1]]
        yield f'        *" {command} "*)'
        if command in FILE_COMMANDS:
            yield f"            [[ $cur == -* ]] || {{ {BASH_FILES}; }}"
        shells = ["bash", "zsh", "fish"] if command == "completion" else []
        yield f'            words="{" ".join(options + shells)}";;'
    yield "    esac"
    yield '    COMPREPLY=($(compgen -W "$words" -- "$cur"))'
    yield "}"
    yield f"complete -o filenames -F _gpt_image2 {' '.join(SHELL_NAMES)}"


def zsh_completion() -> Iterator[str]:
    """Yield zsh's script; it may be sourced, or lie as _gpt-image2 in a folder of fpath."""
    yield f"#compdef {' '.join(SHELL_NAMES)}"
    yield "_gpt_image2() {"
    yield "    local -a commands=("
    for command, row in COMMANDS.items():
        yield f"        '{command}:{row[3]}'"
    yield "    )"
    yield "    if (( CURRENT == 2 )); then _describe command commands; return; fi"
    yield "    local command=$words[2]"
    yield "    shift words; (( CURRENT-- ))"
    yield "    case $command in"
    for command in COMMANDS:
        yield f"        {command}) _arguments -S \\"
        for _, names, kind, dest, text in option_rows(command):
            for name in names:
                yield f"            {zsh_option(name, kind, dest, text)} \\"
        rest = "'*:file:_files'" if command in FILE_COMMANDS else ""
        yield f"            {rest or SHELL_WORDS.get(command, '')};;"
    yield "    esac"
    yield "}"
    yield '[[ $funcstack[1] == _gpt* ]] && _gpt_image2 "$@" || '
    yield f"    compdef _gpt_image2 {' '.join(SHELL_NAMES)}"


def zsh_option(name: str, kind: str, dest: str, text: str) -> str:
    """Return one option as _arguments takes it, in quotes."""
    told = re.sub(r"([\[\]:])", r"\\\1", text).replace("'", "'\\''")
    words = " ".join(re.sub(r"([\[\]:])", r"\\\1", word) for word in offered(dest, kind))
    value = f":{dest}:({words})" if words else f":{dest}: " if kind else ""
    value = f":{dest}:_files" if kind in FILE_KINDS else value
    return f"'*{name}[{told}]{value}'"


def fish_completion() -> Iterator[str]:
    """Yield fish's script: a line for each command and option."""
    for program in SHELL_NAMES:
        yield f"complete -c {program} -f"
        for command, row in COMMANDS.items():
            yield f"complete -c {program} -n __fish_use_subcommand -a {command} -d {quoted(row[3])}"
        for command in COMMANDS:
            seen = f"complete -c {program} -n '__fish_seen_subcommand_from {command}'"
            for _, names, kind, dest, text in option_rows(command):
                flags = " ".join(
                    f"-l {name[2:]}" if name[:2] == "--" else f"-s {name[1:]}" for name in names
                )
                words = quoted(" ".join(offered(dest, kind)))
                value = f" -x -a {words}" if kind else ""
                value = " -r -F" if kind in FILE_KINDS else value
                yield f"{seen} {flags} -d {quoted(text)}{value}"
            if command in FILE_COMMANDS:
                yield f"{seen} -F"
            if command == "completion":
                yield f"{seen} -a 'bash zsh fish'"


################################################################################
# Main
################################################################################


def run(argv: list[str], session: Session) -> int:
    """Run one command line and return its exit code. Raises Failure."""
    console = session.console
    if argv[:1] in (["--version"], ["-V"]):
        console.emit(f"{PROGRAM} {__version__}")
        return EXIT_OK
    if not argv or argv[0] in ("-h", "--help", "help"):
        console.emit(overview())
        return EXIT_OK if argv else EXIT_USAGE
    if any(word in ("-h", "--help") for word in before_dashes(argv)) and argv[0] in COMMANDS:
        console.emit(help_text(argv[0]))
        return EXIT_OK
    args = parse_arguments(argv)
    console.quiet, console.verbose = args.quiet, args.verbose
    session = session._replace(
        new=bool(args.new),
        retry_unsafe=bool(args.retry_unsafe),
        digest=bool(console.json or args.sidecar or args.command == "batch"),
        sidecar=bool(args.sidecar),
        preview=bool(args.preview) and not args.quiet,
    )
    return COMMANDS[args.command][1](args, session)


def before_dashes(argv: Sequence[str]) -> list[str]:
    """Return the words before `--`."""
    words = list(argv)
    return words[: words.index("--")] if "--" in words else words


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code; called without `argv`, end the process itself.

    Python takes 8 ms to clean up after itself, of which nothing needs anything: every line is
    flushed as it is written.
    """
    exit_code = run_once(list(sys.argv[1:] if argv is None else argv))
    if argv is None:
        os._exit(exit_code)
    return exit_code


def run_once(words: list[str]) -> int:
    """Run one command line and return its exit code; the one place where a Failure is printed."""
    console = Console(json="--json" in before_dashes(words))
    umask = os.umask(0o077)  # it can only be read by setting it
    os.umask(umask)
    session = Session(console, mode=0o666 & ~umask)
    command = words[0] if words and words[0] in COMMANDS else ""
    try:
        SIGNALS.install()
        exit_code = run(words, session)
        SIGNALS.ignore()
        return exit_code
    except Interrupted as stop:
        failure = stopped(stop.number, False, unsent=not SIGNALS.sent)
    except Failure as caught:
        failure = caught
    except OSError as error:
        where = printable(str(error.filename or "the current folder, or a file"))
        failure = Failure(f"{where}: {os_reason(error)}", EXIT_REFUSED)
    if console.json:
        console.document(outcome_document(Outcome(command, failure=failure), console))
    console.error(f"{PROGRAM}: {failure}")
    return failure.exit_code


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # before main had the signals
        os._exit(130)

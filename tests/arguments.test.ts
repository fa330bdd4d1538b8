// Words in, words out: the command line, addresses of hosts, quoting, and the small text functions.
import { describe, expect, test } from "bun:test"
import { mkdtempSync, rmSync, writeFileSync } from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"
import {
  encodeScript,
  encodeWord,
  exitCodeOf,
  minimalConfig,
  nearest,
  parseAddress,
  parseArguments,
  shellQuote,
  shown,
  USAGE,
  UsageError,
  type Options,
} from "../edict.ts"

/** What parseArguments says where the command line has no options. */
const DEFAULTS: Options = {
  sync: "auto",
  action: "run",
  json: false,
  verbosity: 0,
  tty: "auto",
  allowMassDelete: false,
  pick: false,
  system: undefined,
  features: [],
  jobs: Number.POSITIVE_INFINITY,
  failFast: false,
  linkSuffix: "",
  report: undefined,
  config: undefined,
  sshOptions: [],
}

type Case = [argv: string[], host: string | undefined, command: string[], options?: Partial<Options>]

const NIX = ["nix", "build", ".#x"]

const accepted: Case[] = [
  // where the command runs
  [["h", ...NIX], "h", NIX],
  [["root@h", ...NIX], "root@h", NIX],
  [["ssh://root@h:2222", ...NIX], "ssh://root@h:2222", NIX],
  [NIX, undefined, NIX],
  [["nix-build", "-A", "x"], undefined, ["nix-build", "-A", "x"]],
  [["h", "nix-shell", "-p", "x"], "h", ["nix-shell", "-p", "x"]],
  [["h", "nixos-rebuild", "build"], "h", ["nixos-rebuild", "build"]],
  [["h", "nix"], "h", ["nix"]],
  // short for nix run
  [["h", ".#bump"], "h", ["nix", "run", ".#bump"]],
  [["h", ".#x", "--", "a", "--b"], "h", ["nix", "run", ".#x", "--", "a", "--b"]],
  [["h", "nixpkgs#hello"], "h", ["nix", "run", "nixpkgs#hello"]],
  [["h", "./nix"], "h", ["nix", "run", "./nix"]],
  [["h", ""], "h", ["nix", "run", ""]],
  // options end at HOST; what stands behind it is the command's
  [["h", ...NIX, "-v", "--sync", "-o", "y"], "h", [...NIX, "-v", "--sync", "-o", "y"]],
  [["h", ...NIX, "--dry-run"], "h", [...NIX, "--dry-run"]],
  [["h", "nix", "run", ".#x", "--", "--help"], "h", ["nix", "run", ".#x", "--", "--help"]],
  [["--", "h", ...NIX], "h", NIX],
  [["-v", "--", "h", ...NIX], "h", NIX, { verbosity: 1 }],
  [["--", ...NIX], undefined, NIX],
  [["h", "nix", "--version"], "h", ["nix", "--version"]],
  [["h", "nix", "a b", "", "\n", "$(x)", "ü", "\\"], "h", ["nix", "a b", "", "\n", "$(x)", "ü", "\\"]],
  // flags
  [["--sync", "h", ...NIX], "h", NIX, { sync: "always" }],
  [["--no-sync", "h", ...NIX], "h", NIX, { sync: "never" }],
  [["--sync", "--no-sync", "h", ...NIX], "h", NIX, { sync: "never" }],
  [["--no-sync", "--sync", "h", ...NIX], "h", NIX, { sync: "always" }],
  [["--tty", "h", ...NIX], "h", NIX, { tty: "always" }],
  [["--no-tty", "h", ...NIX], "h", NIX, { tty: "never" }],
  [["--no-tty", "--tty", "h", ...NIX], "h", NIX, { tty: "always" }],
  [["-n", "h", ...NIX], "h", NIX, { action: "dry-run" }],
  [["--dry-run", "--json", "h", ...NIX], "h", NIX, { action: "dry-run", json: true }],
  [["-v", "h", ...NIX], "h", NIX, { verbosity: 1 }],
  [["-v", "-v", "h", ...NIX], "h", NIX, { verbosity: 2 }],
  [["-vv", "h", ...NIX], "h", NIX, { verbosity: 2 }],
  [["-nvv", "h", ...NIX], "h", NIX, { action: "dry-run", verbosity: 2 }],
  [["-q", "h", ...NIX], "h", NIX, { verbosity: -1 }],
  [["--quiet", "h", ...NIX], "h", NIX, { verbosity: -1 }],
  [["--allow-mass-delete", "h", ...NIX], "h", NIX, { allowMassDelete: true }],
  [["-A", "h", ...NIX], "h", NIX, { sshOptions: ["-A"] }],
  [["--forward-agent", "h", ...NIX], "h", NIX, { sshOptions: ["-A"] }],
  // values
  [["--report", "r.json", "h", ...NIX], "h", NIX, { report: "r.json" }],
  [["--report=r.json", "h", ...NIX], "h", NIX, { report: "r.json" }],
  [["--config", "c d.toml", "h", ...NIX], "h", NIX, { config: "c d.toml" }],
  [["--config=a=b", "h", ...NIX], "h", NIX, { config: "a=b" }],
  [["--config", "a", "--config", "b", "h", ...NIX], "h", NIX, { config: "b" }],
  [["--config", "123", "h", ...NIX], "h", NIX, { config: "123" }],
  // those of ssh: attached or not, in their order, as often as one likes
  [["-p", "22", "h", ...NIX], "h", NIX, { sshOptions: ["-p", "22"] }],
  [["-p22", "h", ...NIX], "h", NIX, { sshOptions: ["-p", "22"] }],
  [["-o", "X=1", "-oY=2", "h", ...NIX], "h", NIX, { sshOptions: ["-o", "X=1", "-o", "Y=2"] }],
  [
    ["-i", "key file", "-J", "jump", "-F", "/dev/null", "h", ...NIX],
    "h",
    NIX,
    { sshOptions: ["-i", "key file", "-J", "jump", "-F", "/dev/null"] },
  ],
  [["-J", "a,b", "-A", "-p", "1", "h", ...NIX], "h", NIX, { sshOptions: ["-J", "a,b", "-p", "1", "-A"] }],
  [["-o", "nix", "h", ...NIX], "h", NIX, { sshOptions: ["-o", "nix"] }],
  [["-o", "-v", "h", ...NIX], "h", NIX, { sshOptions: ["-o", "-v"] }],
  // several hosts, and edict's own business with them
  [["a,b,@ci", ...NIX], "a,b,@ci", NIX],
  [["--pick", "a,b", ...NIX], "a,b", NIX, { pick: true }],
  [["--pick", "--system", "i686-linux", "@all", ...NIX], "@all", NIX, { pick: true, system: "i686-linux" }],
  [["--pick", "--features=kvm,,x", "a", ...NIX], "a", NIX, { pick: true, features: ["kvm", "x"] }],
  [["--jobs", "2", "--fail-fast", "a,b", ...NIX], "a,b", NIX, { jobs: 2, failFast: true }],
  [["--jobs=12", "a,b", ...NIX], "a,b", NIX, { jobs: 12 }],
  [["--link-suffix", "-x", "a", ...NIX], "a", NIX, { linkSuffix: "-x" }],
  [["--hosts"], undefined, [], { action: "hosts" }],
  [["--hosts", "--json"], undefined, [], { action: "hosts", json: true }],
  [["--doctor", "a", "b,c"], "a,b,c", [], { action: "doctor" }],
  [["--doctor", "--json", "a"], "a", [], { action: "doctor", json: true }],
  [["--doctor"], undefined, [], { action: "doctor" }],
  [["--clean", "a", "b"], "a,b", [], { action: "clean" }],
  [["--completion", "zsh"], "zsh", [], { action: "completion" }],
  [["--complete-hosts"], undefined, [], { action: "complete" }],
  // help wins over everything, and needs no host
  [["--help"], undefined, [], { action: "help" }],
  [["-h"], undefined, [], { action: "help" }],
  [["--version"], undefined, [], { action: "version" }],
  [["--dry-run", "--help", "h", ...NIX], undefined, [], { action: "help" }],
]

describe("the command line", () => {
  test.each(accepted.map(([argv, ...rest]) => [argv, rest] as const))(
    "%j",
    async (argv, [host, command, options]) => {
      const parsed = await parseArguments(argv, {})
      expect({ ...parsed, host: parsed.host }).toEqual({
        options: { ...DEFAULTS, ...options },
        host,
        command,
      })
    },
  )

  const refused: [argv: string[], message: string, hint: string][] = [
    [[], "no host and no command", "edict HOST nix build .#x"],
    [["-v"], "no host and no command", "edict HOST"],
    [["--"], "no host and no command", "edict HOST"],
    [["h"], "no command given for host h", "edict h nix build"],
    [["a b"], "no command given for host a b", "edict 'a b' nix build"],
    [["h", "-v"], "option -v stands behind the host", "edict -v h"],
    [["h", "--sync", ...NIX], "option --sync stands behind the host", "edict --sync h"],
    [["--sinc", "h", ...NIX], "unknown option --sinc", "edict --sync"],
    [["--dryrun", "h", ...NIX], "unknown option --dryrun", "edict --dry-run"],
    [["--no-sinc", "h", ...NIX], "unknown option --no-sinc", "edict --no-sync"],
    [["--forwardagent", "h", ...NIX], "unknown option --forwardagent", "edict --forward-agent"],
    [["--xyzzy", "h", ...NIX], "unknown option --xyzzy", "edict --help"],
    [["-x", "h", ...NIX], "unknown option -x", "edict --help"],
    [["-vx", "h", ...NIX], "unknown option -vx", "edict --help"],
    [["-no", "X=1", "h", ...NIX], "unknown option -no", ""],
    [["--v", "h", ...NIX], "unknown option --v", ""],
    [["--o", "h", ...NIX], "unknown option --o", ""],
    [["--no-json", "h", ...NIX], "unknown option --no-json", "edict --json"],
    [["--no-report", "h", ...NIX], "unknown option --no-report", ""],
    [["--no-v", "h", ...NIX], "unknown option --no-v", ""],
    [["--sync=yes", "h", ...NIX], "option --sync takes no value", "edict --sync"],
    [["--no-sync=", "h", ...NIX], "option --no-sync takes no value", "edict --no-sync"],
    [["--x\u001b[31m", "h", ...NIX], "unknown option --x\\x1b[31m", ""],
    [["--constructor", "h", ...NIX], "unknown option --constructor", ""],
    [["--json", "h", ...NIX], "--json goes with --dry-run", "edict --dry-run --json"],
    [
      ["--system", "i686-linux", "h", ...NIX],
      "--system goes with --pick",
      "edict --pick --system i686-linux",
    ],
    [["--features", "kvm", "h", ...NIX], "--features goes with --pick", "edict --pick --features kvm"],
    [["--jobs", "0", "h", ...NIX], "--jobs takes a number from 1, not 0", "edict --jobs"],
    [["--jobs", "-1", "h", ...NIX], "--jobs takes a number from 1, not -1", "edict --jobs"],
    [["--jobs", "two", "h", ...NIX], "--jobs takes a number from 1, not two", "edict --jobs"],
    [["--completion"], "option --completion needs a value", ""],
    [["--doctor", "h", ...NIX], "--doctor takes hosts, no command", "edict --doctor HOST"],
    [["--clean", "h", ...NIX], "--clean takes hosts, no command", "edict --clean HOST"],
    [["--clean"], "--clean takes no default", "edict --clean HOST"],
    [["--picc", "h", ...NIX], "unknown option --picc", "edict --pick"],
    [["--report"], "option --report needs a value", ""],
    [["--report=", "h", ...NIX], "option --report needs a value", ""],
    [["--config", "", "h", ...NIX], "option --config needs a value", ""],
    [["-p"], "option -p needs a value", ""],
    [["-o", "", "h", ...NIX], "option -o needs a value", ""],
  ]
  test.each(refused)("%j: %s", async (argv, message, hint) => {
    const error: unknown = await parseArguments(argv, {}).catch((thrown: unknown) => thrown)
    if (!(error instanceof UsageError)) throw new Error(`no UsageError: ${JSON.stringify(error)}`)
    expect(error.message).toStartWith(message)
    expect(error.hint).toStartWith(hint)
    expect(`${error.message}${error.hint}`).not.toMatch(/[\n\u001b]/)
    expect(error.exitCode).toBe(254)
  })

  test("$EDICT_HOST is the host where none is given, and only there", async () => {
    const env = { EDICT_HOST: "big" }
    expect((await parseArguments(NIX, env)).host).toBe("big")
    expect((await parseArguments(["h", ...NIX], env)).host).toBe("h")
    expect((await parseArguments(NIX, { EDICT_HOST: "" })).host).toBeUndefined()
  })
})

describe("the help", () => {
  const part = /\n  --sync[^]*?\n\n/.exec(USAGE)?.[0] ?? ""
  const left = part.split("\n").map((line) => line.trim().split(/\s{2,}/)[0] ?? "")
  const documented = left.flatMap((line) => line.split(/,? (?=-)/)).filter((option) => option !== "")
  const names = documented.map((option) => option.split(" ")[0] ?? "")

  test("names each option once", () => {
    expect(names).toContain("--no-sync")
    expect(names).toContain("-J")
    expect(new Set(names).size).toBe(names.length)
  })

  test.each(documented)("%s is an option", async (option) => {
    const [name = "", value] = option.split(" ")
    const partner = { "--json": "--dry-run", "--system": "--pick", "--features": "--pick" }[name]
    const argv = [
      name,
      ...(value === undefined || value === "HOST…" ? [] : [name === "--jobs" ? "3" : "value"]),
    ]
    const command = ["--doctor", "--clean"].includes(name) ? [] : NIX
    const parse = async (words: string[]) =>
      parseArguments([...(partner === undefined ? [] : [partner]), ...words], {})
    const { options, host } = await parse([...argv, "h", ...command])
    expect(options).not.toEqual((await parse(["h", ...NIX])).options)
    if (["run", "dry-run", "doctor", "clean"].includes(options.action)) expect(host).toBe("h")
  })

  const known =
    `--sync --no-sync -n --dry-run --json --report --allow-mass-delete -v -q --quiet --tty --no-tty
    -A --forward-agent -o -p -i -F -J --config --pick --system --features --jobs --fail-fast --link-suffix
    --doctor --hosts --clean --completion --help --version`.split(/\s+/)
  test.each(known)("%s is documented", (name) => {
    expect(`${names.join("\n")}\n-vv`.split("\n")).toContain(name)
  })
})

describe("the address of a host", () => {
  const good: [string, string, string?][] = [
    ["h", "h"],
    ["root@h", "root@h"],
    ["big.example.com", "big.example.com"],
    ["a_b", "a_b"],
    ["user@corp@h", "user@corp@h"],
    ["10.0.0.1", "10.0.0.1"],
    ["::1", "::1"],
    ["[::1]", "::1"],
    ["root@[fe80::1%eth0]", "root@fe80::1%eth0"],
    ["ssh://h", "h"],
    ["ssh://h/", "h"],
    ["ssh://root@h:2222", "root@h", "2222"],
    ["ssh://root@h:2222/", "root@h", "2222"],
    ["ssh-ng://root@h", "root@h"],
    ["ssh-ng://h:22?compress=true", "h", "22"],
    ["ssh://[::1]", "::1"],
    ["ssh://[::1]:22", "::1", "22"],
    ["ssh://u@[fe80::1%eth0]:22", "u@fe80::1%eth0", "22"],
    ["ssh://fe80::1", "fe80::1"],
    ["ssh://fe80::22", "fe80::22"],
  ]
  test.each(good.map(([word, ...rest]) => [word, rest] as const))("%s", (word, [destination, port]) => {
    expect(parseAddress(word)).toEqual({ destination, port })
  })

  const bad: [string, string][] = [
    ["", "is empty"],
    ["ssh://", "is empty"],
    ["-h", "starts with -"],
    ["-oProxyCommand=x", "has characters"],
    ["-oProxyCommand", "starts with -"],
    ["root@-h", "starts with -"],
    ["-root@h", "starts with -"],
    ["ssh://-oProxyCommand", "starts with -"],
    ["ssh://root@-h:22", "starts with -"],
    ["ssh://[-h]", "starts with -"],
    ["[-h]", "starts with -"],
    ["@h", "lacks a name"],
    ["root@", "lacks a name"],
    ["ssh://:22", "lacks a name"],
    ["ssh://root@:22", "lacks a name"],
    ["[]", "lacks a name"],
    ["h;x", "has characters"],
    ["h x", "has characters"],
    ["h\nx", "has characters"],
    ["h\n", "has characters"],
    ["$(x)", "has characters"],
    ["`x`", "has characters"],
    ["h'x", "has characters"],
    ["h|x", "has characters"],
    ["h/x", "has characters"],
    ["ssh://h/x", "has characters"],
    ["http://h", "has characters"],
    ["hüte", "has characters"],
    ["h\u0000", "has characters"],
  ]
  test.each(bad)("%j %s", (word, why) => {
    let error: unknown
    try {
      parseAddress(word)
    } catch (thrown) {
      error = thrown
    }
    if (!(error instanceof UsageError)) throw new Error(`accepted: ${JSON.stringify(parseAddress(word))}`)
    expect(error.message).toContain(why)
    expect(error.message).not.toMatch(/[\n\0]/)
    expect(error.exitCode).toBe(254)
  })
})

/** The same every time: bytes of a small generator, weighted towards those that shells care for. */
function randomBytes(count: number, seed: number): Buffer {
  const special = Buffer.from("\\\\'\"$`!*?[]{}()<>|&;~#%=^ \t\n\r-.0123")
  let state = seed
  const next = (below: number) => {
    state = (state * 1103515245 + 12345) % 2147483648
    return Math.floor((state / 2147483648) * below)
  }
  return Buffer.from(
    Array.from({ length: count }, () => (next(2) ? special[next(special.length)]! : next(255) + 1)),
  )
}

const SHELLS = [["sh"], ["dash"], ["bash"], ["bash", "--posix"], ["zsh"], ["busybox", "sh"]]

describe("words for shells", () => {
  const samples = [
    Buffer.from(""),
    Buffer.from("-"),
    Buffer.from("-n"),
    Buffer.from("--"),
    Buffer.from("a\\c b"),
    Buffer.from("\\0101\\x41%s"),
    Buffer.from("\n\n"),
    Buffer.from("käse ☃ 😀"),
    Buffer.from(Array.from({ length: 255 }, (_, n) => n + 1)),
    ...Array.from({ length: 12 }, (_, n) => randomBytes(1 + n * 23, n + 1)),
  ]

  /** Runs a script and answers what it printed, byte by byte. */
  const run = (shell: readonly string[], ...words: string[]): Buffer => {
    const { exitCode, stdout, stderr } = Bun.spawnSync([...shell, "-c", ...words], {
      env: { PATH: process.env.PATH! },
    })
    if (exitCode !== 0) throw new Error(stderr.toString())
    return stdout
  }

  test.each(SHELLS)(
    "encodeWord comes back out of printf %%b in %s %s",
    (...shell: (string | undefined)[]) => {
      const argv = shell.filter((word) => word !== undefined)
      for (const sample of samples.filter(({ length }) => length > 0)) {
        const encoded = encodeWord(sample.toString("latin1"), "latin1")
        expect(encoded).toMatch(/^[A-Za-z0-9./_\\-]+$/)
        // As the remote side does it: a command substitution, with a dot that keeps the line ends.
        const script = `decoded=$(printf '%b.' "$1"); printf %s "\${decoded%.}"`
        expect(run(["env", "LC_ALL=C", ...argv], script, argv[0]!, encoded).toString("hex")).toBe(
          sample.toString("hex"),
        )
        expect(run(argv, `printf %b "$1"`, argv[0]!, encoded).toString("hex")).toBe(sample.toString("hex"))
      }
    },
  )

  test("encodeWord: nothing is -, - is not, NUL is a byte like any other", () => {
    expect(encodeWord("")).toBe("-")
    expect(encodeWord("-")).not.toBe("-")
    expect(run(["sh"], `printf %b "$1"`, "sh", encodeWord("a\0b\0"))).toEqual(Buffer.from("a\0b\0"))
    expect(run(["busybox", "sh"], `printf %b "$1"`, "sh", encodeWord("ü", "utf8"))).toEqual(Buffer.from("ü"))
  })

  test("a digit behind an octal byte stays a digit", () => {
    for (const shell of SHELLS)
      expect(run(shell, `printf %b "$1"`, "x", encodeWord(" 1\n23")).toString()).toBe(" 1\n23")
  })

  test.each(SHELLS)(
    "encodeScript comes back out of read and printf %%b in %s %s",
    (...shell: (string | undefined)[]) => {
      const argv = shell.filter((word) => word !== undefined)
      const script = "a\\nb\\\\c \"$(x)\" '\t'\n\\\n%s \\0101\nend"
      const { stdout } = Bun.spawnSync([...argv, "-c", `IFS= read -r s; printf %b "$s"`], {
        stdin: Buffer.from(`${encodeScript(script)}\n`),
      })
      expect(stdout.toString()).toBe(script)
    },
  )

  test.each(SHELLS)("shellQuote is one word again in %s %s", (...shell: (string | undefined)[]) => {
    const argv = shell.filter((word) => word !== undefined)
    const texts = [
      "", "a", "~", "~root", "a=b", "=ls", "*", "{a,b}", "!!", "#x", "-n", "it's", "'", "''", "\\", "a\nb", "ü ☃", "$HOME",
      ...Array.from({ length: 8 }, (_, n) => randomBytes(40, n + 77).toString("latin1").replace(/[\x80-\xff]/g, "é")),
    ] // prettier-ignore
    const script = `for w in ${texts.map(shellQuote).join(" ")}; do printf '%s\\0' "$w"; done`
    expect(run(argv, script).toString().split("\0").slice(0, -1)).toEqual(texts)
  })
})

describe("text for people", () => {
  const close: [string, string[], string | undefined][] = [
    ["--sinc", ["--sync", "--json"], "--sync"],
    ["sytems", ["systems", "speed"], "systems"],
    ["systems", ["systems", "speed"], "systems"],
    ["foward-agent", ["forward-agent", "features"], "forward-agent"],
    ["xyzzy", ["systems", "speed"], undefined],
    ["", ["systems"], undefined],
    ["x", [], undefined],
  ]
  test.each(close)("nearest to %j of %j is %p", (word, candidates, expected) => {
    expect(nearest(word, candidates)).toBe(expected)
  })

  const visible: [string, string][] = [
    ["plain ü ☃ 😀", "plain ü ☃ 😀"],
    ["a\nb\tc", "a\\x0ab\\x09c"],
    ["\u001b]0;owned\u0007", "\\x1b]0;owned\\x07"],
    ["\u009b31m", "\\x9b31m"],
    ["\u007f\u0000", "\\x7f\\x00"],
  ]
  test.each(visible)("shown %j", (word, expected) => expect(shown(word)).toBe(expected))

  const ends: [number | null, NodeJS.Signals | null, number][] = [
    [0, null, 0],
    [7, null, 7],
    [255, null, 255],
    [null, "SIGINT", 130],
    [null, "SIGKILL", 137],
    [null, "SIGTERM", 143],
  ]
  test.each(ends)("exit code %p, signal %p: %p", (exitCode, signal, expected) => {
    expect(exitCodeOf({ exitCode, signal })).toBe(expected)
  })
})

describe("the git config that travels", () => {
  /** What git reads from a config, as `git config --list` says it. */
  const read = (config: string): string[] => {
    const directory = mkdtempSync(join(tmpdir(), "edict-config-"))
    try {
      writeFileSync(join(directory, "config"), config)
      const argv = ["git", "config", "--file", join(directory, "config"), "--null", "--list"]
      const { exitCode, stdout, stderr } = Bun.spawnSync(argv)
      if (exitCode !== 0) throw new Error(stderr.toString())
      return stdout.toString().split("\0").slice(0, -1)
    } finally {
      rmSync(directory, { recursive: true })
    }
  }
  const always = ["core.repositoryformatversion\n0", "core.bare\nfalse"]

  test("is never empty", () => {
    expect(read(minimalConfig(""))).toEqual(always)
  })

  test.each([
    "user.name\nEd \"the\" \\ 'x' # ; ü",
    "user.name\n  blanks  ",
    "user.email\nline\nbreak\ttab",
    "core.filemode\nfalse",
    "core.autocrlf\ninput",
    'submodule.a.b c"d\\e.active\nfalse',
  ])("keeps %j", (pair) => {
    expect(read(minimalConfig(`${pair}\0`))).toEqual([...always, pair])
  })

  test("an option without a value is true", () => {
    expect(read(minimalConfig("core.filemode\0user.name\nEd\0"))).toEqual([
      ...always,
      "core.filemode\ntrue",
      "user.name\nEd",
    ])
  })

  test("the last value counts", () => {
    expect(read(minimalConfig("user.name\nA\0user.name\nB\0"))).toEqual([...always, "user.name\nB"])
  })

  test("an object format asks for version 1", () => {
    expect(read(minimalConfig("extensions.objectformat\nsha256\0"))).toEqual([
      "core.repositoryformatversion\n1",
      "core.bare\nfalse",
      "extensions.objectformat\nsha256",
    ])
  })

  test("urls of submodules stay here; that these are in use does not", () => {
    const config = minimalConfig("submodule.lib/x.url\nhttps://user:token@host/x\0")
    expect(config).not.toContain("token")
    expect(read(config)).toEqual([...always, "submodule.lib/x.active\ntrue"])
  })
})

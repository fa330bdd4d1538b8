// A host that lies: whatever it sends, nothing is written outside the tree, into a .git or through a link, and
// nothing of it runs here. Its find, tar, readlink and cat are scripts that say what an attacker would.
import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test"
import fs from "node:fs"
import { join } from "node:path"
import {
  bytes,
  collisions,
  compareTrees,
  parseChanges,
  parseGitChanges,
  shown,
  unsafeName,
  withExecutable,
  type Entry,
} from "../edict"
import { conflictsOf, expectNothingLeft, snapshot, startLab, type Lab } from "./sync-lab"

setDefaultTimeout(120_000)

// ── What the host sends ───

type Member = {
  name: string
  type?: keyof typeof TYPES
  text?: string
  link?: string
  mode?: number
  size?: number
}
const TYPES = { file: "0", hard: "1", link: "2", device: "3", directory: "5", fifo: "6" } as const

/** A tar archive of these members, in this order, whatever they are. */
function tarOf(members: readonly Member[]): Buffer {
  const blocks = members.flatMap((member) => {
    const data = Buffer.from(member.text ?? "")
    const header = Buffer.alloc(512)
    header.write(member.name, 0, 100)
    const octal = (value: number, length: number) => `${value.toString(8).padStart(length - 1, "0")}\0`
    const isFile = (member.type ?? "file") === "file"
    header.write(octal(member.mode ?? 0o644, 8) + octal(0, 8) + octal(0, 8), 100)
    header.write(
      octal(isFile ? (member.size ?? data.length) : 0, 12) + octal(1_000_000_000, 12) + " ".repeat(8),
      124,
    )
    header.write(TYPES[member.type ?? "file"], 156)
    header.write(member.link ?? "", 157, 100)
    header.write("ustar\x0000", 257)
    if (member.type === "device") header.write(octal(1, 8) + octal(3, 8), 329)
    const sum = header.reduce((total, byte) => total + byte, 0)
    header.write(`${sum.toString(8).padStart(6, "0")}\0 `, 148)
    return [header, data, Buffer.alloc((512 - (data.length % 512)) % 512)]
  })
  return Buffer.concat([...blocks, Buffer.alloc(1024)])
}

type Attack = {
  name: string
  /** Made here before the first run. */
  setup?: string
  /** What the listing names besides what is there: files, links and directories. */
  names?: string[]
  links?: string[]
  directories?: string[]
  /** Sizes that it announces for names. Default: 3 bytes. */
  size?: number
  /** What tar sends; undefined: what a real one sends. */
  members?: Member[]
  /** The command's own doing. */
  command?: string
  options?: string[]
  code?: number
  says?: RegExp[]
  /** Paths that may change here, with their contents (@ is the directory above); all else must stay as it is. */
  here?: Record<string, string>
  gone?: string[]
  kept?: Record<string, string>
  plain?: true
}

const EVIL = "#!/bin/sh -p\nunset file\necho pwned >/tmp/pwned\n"
const gitNames = [".git/hooks/post-checkout", ".git/config", ".git"]
const refusedNames = [
  "../x",
  "../../x",
  "a/../../x",
  "..",
  ".GIT/x",
  ".Git/hooks/post-checkout",
  ".g\u200cit/x",
  "git~1/x",
  "GIT~1/config",
  ".git /x",
  ".git./x",
  ".git::$INDEX_ALLOCATION/x",
  "/root/victim/abs",
  "a//b",
  "a/./b",
  "a/",
]

const attacks: Attack[] = [
  {
    name: "73 names that lead out of the tree or into a .git are refused, one by one",
    names: ["good", ...refusedNames],
    members: [
      { name: "./good", text: "yes" },
      ...[".GIT/x", ".Git/hooks/post-checkout", ".g\u200cit/x", "git~1/x", "GIT~1/config"].map((name) => ({
        name,
        text: EVIL,
        mode: 0o755,
      })),
    ],
    code: 254,
    here: { good: "yes" },
    says: refusedNames.map(() => /is no path inside the tree|lies in a \.git/),
  },
  {
    name: "73b what it puts into .git is not even fetched",
    names: ["good", ...gitNames, "sub/.git/config", "sub/.git/HEAD"],
    setup: "mkdir sub; echo s >sub/s",
    members: [
      { name: "good", text: "yes" },
      ...[...gitNames.slice(0, 2), "sub/.git/config"].map((name) => ({ name, text: EVIL, mode: 0o755 })),
    ],
    here: { good: "yes" },
    says: [/sub\/\.git was made over there, and stays there/],
  },
  {
    name: "73c members that were not asked for, with .. and absolute names",
    names: ["good"],
    members: [
      { name: "good", text: "yes" },
      { name: "../../../../x", text: EVIL },
      { name: "/root/victim/keep", text: EVIL },
    ],
    code: 254,
  },
  {
    name: "73d further members that were not announced",
    names: ["good"],
    members: [
      { name: "good", text: "yes" },
      { name: "more", text: EVIL },
      { name: ".git/hooks/post-checkout", text: EVIL, mode: 0o755 },
      { name: "docs/more", text: EVIL },
    ],
    here: { good: "yes" },
  },
  {
    name: "74 a link into .git/hooks, then a file through it",
    links: ["zz"],
    names: ["zz/post-checkout"],
    members: [
      { name: "zz", type: "link", link: ".git/hooks" },
      { name: "zz/post-checkout", text: EVIL, mode: 0o755 },
    ],
    code: 254,
  },
  {
    name: "74b a link out of the tree, then a file through it",
    links: ["zz"],
    names: ["zz/keep"],
    members: [
      { name: "zz", type: "link", link: "../victim" },
      { name: "zz/keep", text: EVIL },
    ],
    code: 254,
  },
  {
    name: "74c a link out of the tree, and a name through it that exists here",
    links: ["zz"],
    names: ["zz/keep", "zz/new"],
    members: [{ name: "zz", type: "link", link: "../victim" }],
    code: 254,
    here: { zz: "-> ../victim" },
    says: [/zz\/keep did not arrive/],
  },
  {
    name: "74g an absolute link out of the tree, and a name through it that exists here",
    links: ["zz"],
    names: ["zz/keep"],
    members: [{ name: "zz", type: "link", link: "@/victim" }],
    code: 254,
    here: { zz: "-> @/victim" },
    says: [/zz\/keep did not arrive/],
  },
  {
    name: "74d an existing link here to a directory outside",
    setup: "ln -s ../victim out",
    names: ["out/keep", "out/new"],
    members: [
      { name: "out/keep", text: "bad" },
      { name: "out/new", text: "bad" },
    ],
    code: 254,
    kept: { "out/keep": "bad", "out/new": "bad" },
    says: [/out\/keep cannot be placed: out is no directory here/],
  },
  {
    name: "74e an existing link here is replaced, not followed",
    setup: "ln -s ../victim/keep out; echo f >f",
    command: "rm out; echo there >out; rm f; ln -s ../victim/keep f",
    here: { out: "there\n", f: "-> ../victim/keep" },
  },
  {
    name: "74f deletions do not go through a link either",
    setup: "mkdir d; echo x >d/keep",
    command: "rm -r d",
    gone: ["d", "d/keep"],
  },
  {
    name: "75 devices, fifos and sockets are refused, setuid bits stripped",
    names: ["dev", "pipe", "suid"],
    members: [
      { name: "dev", type: "device" },
      { name: "pipe", type: "fifo" },
      { name: "suid", text: "bad", mode: 0o6755 },
    ],
    code: 254,
    here: { suid: "bad" },
    says: [/conflict: dev did not arrive as what it was named/, /conflict: pipe did not arrive/],
  },
  {
    name: "75b real ones: a fifo that the command made",
    command: "mkfifo pipe; echo a >a; chmod 6777 a",
    code: 254,
    here: { a: "*a\n" },
    says: [/conflict: pipe is no file, directory or link/],
  },
  {
    name: "75c hard links: to a file outside nothing comes; among files each is on its own",
    names: ["one", "two", "passwd"],
    members: [
      { name: "one", text: "one" },
      { name: "two", type: "hard", link: "one" },
      { name: "passwd", type: "hard", link: "/etc/passwd" },
    ],
    code: 254,
  },
  {
    name: "75d hard links among files: each is on its own here",
    command: "echo one >one; ln one two",
    here: { one: "one\n", two: "one\n" },
  },
  {
    name: "76 a bare repository that its parts would make",
    directories: ["docs", "docs/objects", "docs/refs"],
    names: ["docs/HEAD", "docs/config", "docs/objects/x", "docs/refs/x", "docs/readme"],
    members: [
      { name: "docs/HEAD", text: "ref: refs/heads/main\n" },
      { name: "docs/config", text: "[core]\n\tfsmonitor = touch /tmp/pwned\n" },
      { name: "docs/readme", text: "yes" },
      { name: "docs/objects/x", text: "x" },
      { name: "docs/refs/x", text: "x" },
    ],
    code: 254,
    here: { "docs/readme": "yes" },
    says: [/docs\/config would be part of a git repository in docs/],
  },
  {
    name: "76b a repository of which one part was missing",
    setup: "mkdir -p d/objects d/refs; touch d/objects/x d/refs/x",
    command: "echo 'ref: refs/heads/main' >d/HEAD; echo '[core]' >d/config; echo y >d/y",
    code: 254,
    here: { "d/y": "y\n" },
    says: [/d\/HEAD would be part of a git repository/],
  },
  {
    name: "76c a repository by commondir, and a hook for one that is tracked",
    setup: "git init -q --bare bare; echo k >bare/refs/keep; echo k >bare/objects/keep",
    command: "mkdir c; echo x >c/HEAD; echo ../bare >c/commondir; echo evil >bare/hooks/post-checkout",
    code: 254,
    gone: ["c"],
    says: [/c\/HEAD would be part/, /bare\/hooks\/post-checkout would be part/],
  },
  {
    name: "77 below a tracked core.hooksPath: held, without its executable bit",
    setup:
      "mkdir -p .githooks/sub; echo ok >.githooks/pre-commit; echo l >.githooks/sub/lib; git config core.hooksPath .githooks",
    command:
      "echo evil >.githooks/pre-commit; echo evil >.githooks/post-checkout; chmod +x .githooks/*; rm .githooks/sub/lib; echo n >n",
    code: 254,
    here: { n: "n\n" },
    kept: { ".githooks/pre-commit": "evil\n", ".githooks/post-checkout": "evil\n" },
    says: [/\.githooks\/pre-commit is run or obeyed by git here \(core\.hookspath\)/],
  },
  {
    name: "77b the directory above the hooks replaced by a link",
    setup: "mkdir -p tools/hooks; echo ok >tools/hooks/pre-commit; git config core.hooksPath tools/hooks",
    command: "mkdir -p evil/hooks; echo evil >evil/hooks/pre-commit; rm -r tools; ln -s evil tools",
    code: 254,
    here: { "evil/hooks/pre-commit": "evil\n" },
    kept: { tools: "-> evil" },
  },
  {
    name: "77c a config file of the tree that git includes",
    setup: "echo '[alias]' >.gitshared; git config include.path ../.gitshared",
    command: "printf '[core]\\n\\tfsmonitor = touch /tmp/pwned\\n' >.gitshared",
    code: 254,
    kept: { ".gitshared": "[core]\n\tfsmonitor = touch /tmp/pwned\n" },
    says: [/\(include\.path\)/],
  },
  {
    name: "80 escape sequences in names are shown, not sent to the terminal",
    names: ["\u001b]0;pwned\u0007x", "\u001b[2Jy/..", "\u202ename", "good"],
    members: [
      { name: "good", text: "yes" },
      { name: "\u001b]0;pwned\u0007x", text: "bad" },
      { name: "\u202ename", text: "bad" },
    ],
    code: 254,
    here: { good: "yes", "\u001b]0;pwned\u0007x": "bad", "\u202ename": "bad" },
    says: [/\\x1b\]0;pwned\\x07x/, /\\u202ename/],
  },
  {
    name: "81 an endless stream is cut off, and nothing of it is applied",
    names: ["good", "big"],
    members: [
      { name: "good", text: "yes" },
      { name: "big", size: 2 ** 33 - 1 },
    ],
    code: 254,
    says: [/cut off, or more than h had announced; nothing of them was applied here/],
  },
  {
    name: "81b more announced than there is space for",
    names: ["good"],
    size: 10 ** 14,
    members: [{ name: "good", text: "yes" }],
    code: 254,
    says: [/no space left for them here/],
  },
  {
    name: "81c a stream that ends in the middle",
    names: ["good", "big"],
    members: [
      { name: "good", text: "yes" },
      { name: "big", size: 2 ** 30 + 1 },
    ],
    code: 254,
    says: [/cut off/],
  },
  {
    name: "links into the store: into .git, through a link, below a hooks path",
    setup: "ln -s ../victim out; mkdir .githooks; echo h >.githooks/h; git config core.hooksPath .githooks",
    links: [".git/hooks/post-checkout", "sub/.git", "out/new", ".githooks/pre-commit", "../evil"],
    code: 254,
  },
  {
    name: "links into the store named by the directory listing: out of it, or .git",
    plain: true,
    options: ["--no-sync"],
    links: ["../evil", ".git", "a/b", "/root/victim/l"],
  },
  {
    name: "outside git: a .git, a bare repository at the top, and names of edict's own",
    plain: true,
    setup: "echo a >a",
    names: [
      ".git/config",
      "HEAD",
      "objects/x",
      "refs/x",
      "config",
      ".edict-conflicts/x",
      ".edict-stage/x",
      "good",
    ],
    members: [
      { name: "good", text: "yes" },
      { name: ".git/config", text: EVIL },
      ...["HEAD", "objects/x", "refs/x", "config"].map((name) => ({ name, text: "bad" })),
    ],
    code: 254,
    here: { good: "yes" },
  },
]

/** The lying programs. They lie when the command has switched them on, so that the upload still works. */
const PROGRAMS: Record<string, string> = {
  find: `evil=/tmp/evil/$(basename "$PWD")
case "$*" in
  *--version*) exec "$real" "$@" ;;
  *'-maxdepth 1 -type l'*) "$real" "$@"; [ ! -e "$evil/on" ] || cat "$evil/links" ;;
  *) "$real" "$@" || exit; [ ! -e "$evil/on" ] || cat "$evil/listing" ;;
esac`,
  tar: `evil=/tmp/evil/$(basename "$PWD")
if [ -e "$evil/on" ] && [ -e "$evil/tar" ] && case " $* " in *' -cf '*) ;; *) false ;; esac; then
  cat >/dev/null
  cat "$evil/tar"
  if [ -e "$evil/endless" ]; then exec yes; fi
else exec "$real" "$@"; fi`,
  readlink: `if [ -e "$1" ] || [ -L "$1" ]; then exec "$real" "$@"; fi
case $1 in */zz) echo ../victim ;; *) cat /tmp/evil/store ;; esac`,
}

async function installPrograms(lab: Lab): Promise<void> {
  await lab.host.sh(`mkdir -p /tmp/evil && echo ${lab.store} >/tmp/evil/store`)
  for (const [name, text] of Object.entries(PROGRAMS)) {
    const script = `#!/bin/sh\nreal=/run/lab/usr/bin/${name}\n${text}\n`
    const result = await lab.host.sh(
      `rm -f /usr/local/bin/${name} && cat >/usr/local/bin/${name} && chmod +x /usr/local/bin/${name}`,
      {
        stdin: script,
      },
    )
    expect(result).toMatchObject({ code: 0, stderr: "" })
  }
}

// ── The attacks ───

/** Everything below a directory, .git and all, with modes: what must not change. */
function everything(directory: string, ignore: RegExp): Record<string, string> {
  const found: Record<string, string> = {}
  const walk = (name: string) => {
    for (const item of fs.readdirSync(join(directory, name)).sort()) {
      const inner = name === "" ? item : `${name}/${item}`
      if (ignore.test(inner)) continue
      const stat = fs.lstatSync(join(directory, inner))
      const file = join(directory, inner)
      const content = stat.isSymbolicLink()
        ? fs.readlinkSync(file)
        : stat.isFile()
          ? fs.readFileSync(file, "latin1")
          : ""
      found[inner] = `${stat.mode.toString(8)} ${content}`
      if (stat.isDirectory()) walk(inner)
    }
  }
  walk("")
  return found
}

async function attack(lab: Lab, item: Attack, at: number): Promise<void> {
  const name = `attack-${at}`
  const home = `/root/${name}`
  const cwd = `${home}/${name}`
  const repository = item.plain ? "" : "git init -q"
  const commit = item.plain ? "" : "git add -A; git commit -qm first --allow-empty"
  const made = await lab.client.run([
    "/bin/sh",
    "-ec",
    `mkdir -p ${cwd} ${home}/victim; echo kept >${home}/victim/keep; cd ${cwd}; ${repository}\n${item.setup ?? ""}\n${commit}`,
  ])
  expect(made).toMatchObject({ code: 0 })
  const evil = lab.host.outside(`/tmp/evil/${name}`)
  fs.mkdirSync(evil, { recursive: true })
  const names = [
    ...(item.directories ?? []).map((path) => ({ type: "d", path })),
    ...(item.links ?? []).map((path) => ({ type: "l", path })),
    ...(item.names ?? []).map((path) => ({ type: "f", path })),
  ]
  const listed = names.map(
    ({ type, path }, index) =>
      `${type}644/${900000 + index}/${item.size ?? 3}/1.0/1.0/${path.startsWith("/") ? path : `./${path}`}\0`,
  )
  fs.writeFileSync(join(evil, "listing"), listed.join(""))
  fs.writeFileSync(join(evil, "links"), names.map(({ path }, index) => `1/${index}/1.0/./${path}\n`).join(""))
  if (item.members) {
    const tar = tarOf(
      item.members.map((member) => ({ ...member, link: member.link?.replace("@", home) ?? "" })),
    )
    const bomb = item.members.some(({ size }) => size !== undefined)
    fs.writeFileSync(join(evil, "tar"), bomb ? tar.subarray(0, -1024) : tar)
    if (item.members.some(({ size }) => size === 2 ** 33 - 1)) fs.writeFileSync(join(evil, "endless"), "")
  }
  const quiet = await lab.edict(cwd, ":", { options: item.options ?? [] })
  expect(quiet).toMatchObject({ code: 0 })
  const ignore = /^(attack-\d+\/\.git\/(edict|index)(\/|$)|attack-\d+\/\.edict-conflicts(\/|$))/
  const before = everything(lab.client.outside(home), ignore)
  const result = await lab.edict(cwd, `${item.command ?? ":"}\ntouch /tmp/evil/${name}/on`, {
    options: item.options ?? [],
  })
  fs.rmSync(join(evil, "on"))
  const after = everything(lab.client.outside(home), ignore)
  if (process.env.SYNC_CASE) console.log(result.stderr)
  const here = lab.client.outside(cwd)
  const allowed = new Set(
    [...Object.keys(item.here ?? {}), ...(item.gone ?? [])].map((path) => `${name}/${path}`),
  )
  const parents = new Set(
    [...allowed].flatMap((path) => path.split("/").map((_, end, parts) => parts.slice(0, end).join("/"))),
  )
  const changed = [...new Set([...Object.keys(before), ...Object.keys(after)])].filter(
    (path) => before[path] !== after[path],
  )
  expect(changed.filter((path) => !allowed.has(path) && !parents.has(path))).toEqual([])
  const contents = snapshot(here)
  for (const [path, text] of Object.entries(item.here ?? {}))
    expect(`${path}: ${contents.get(bytes(path)) ?? ""}`).toBe(`${path}: ${text.replace("@", home)}`)
  expect(conflictsOf(here)).toEqual(item.kept ?? {})
  expect(fs.existsSync(lab.client.outside("/tmp/pwned"))).toBe(false)
  const special = await lab.client.sh(
    `find ${home} \\( -perm /7000 -o -type p -o -type b -o -type c -o -links +1 -type f ! -path '*/.git/*' \\) -print`,
  )
  expect(special.stdout).toBe("")
  expectNothingLeft(here)
  expect(result.stderr).not.toContain("this is a bug")
  // eslint-disable-next-line no-control-regex
  expect(result.stderr).not.toMatch(/[\u0000-\u0008\u000b-\u001f\u007f\u202e]/)
  for (const pattern of item.says ?? []) expect(result.stderr).toMatch(pattern)
  expect(result.code).toBe(item.code ?? 0)
}

const only = process.env.SYNC_CASE
describe("a hostile host", () => {
  let lab: Lab
  beforeAll(async () => {
    lab = await startLab([{ hide: ["zsh"] }])
    await installPrograms(lab)
  })
  afterAll(async () => await lab?.[Symbol.asyncDispose]())
  for (const [at, item] of attacks.entries())
    if (!only || item.name.startsWith(only)) test(item.name, async () => await attack(lab, item, at))
})

// ── A host whose shell is the liar ───

describe("a host that answers nonsense", () => {
  const answers: [name: string, script: string, says: RegExp][] = [
    ["nothing at all", "exit 0", /the connection to h was lost/],
    ["lines of no kind", "yes garbage | head -n 1000; sleep 1", /the connection to h was lost/],
    ["only ok", "yes .ok | head -n 1000; sleep 1", /./],
    [
      "a failure with escapes",
      String.raw`f='.fail \033[2Jgone\n'; printf "$f$f$f$f$f"; sleep 1`,
      /\\x1b\[2Jgone/,
    ],
    [
      "facts without a tree's state",
      String.raw`printf 'f home /root\nf base /root/x\nf rsync yes\n.ok\n.ok\n.ok\n.ok\n.ok\n'; sleep 1`,
      /./,
    ],
    ["an endless answer", "yes '+f644/1/3/1.0/1.0/./x'", /answers without an end/],
    ["an endless line", "tr '\\0' x </dev/zero", /answers without an end/],
  ]
  let lab: Lab
  beforeAll(async () => {
    lab = await startLab([{ sshdConfig: ["PermitUserEnvironment no"] }])
    await lab.client.sh("mkdir p && cd p && git init -q && echo a >a && git add a && git commit -qm first")
  })
  afterAll(async () => await lab?.[Symbol.asyncDispose]())
  test.each(answers)("%s", async (_, script, says) => {
    await lab.host.sh("cat >/root/liar && chmod +x /root/liar", { stdin: `#!/bin/sh\n${script}\n` })
    await lab.client.sh(
      `sed -i '/^ *RemoteCommand/d' .ssh/config; ssh -O exit h 2>/dev/null; rm -f /tmp/edict-0/*`,
    )
    await lab.host.sh(
      `printf 'restrict,command="/root/liar" ' >/root/.ssh/lie; cat /root/.ssh/authorized_keys | sed 's/^restrict,command="[^"]*" //' >>/root/.ssh/lie; mv /root/.ssh/lie /root/.ssh/authorized_keys`,
    )
    const before = everything(lab.client.outside("/root/p"), /^\.git\/edict/)
    const result = await lab.edict("/root/p", ":")
    expect(result.stderr).not.toContain("this is a bug")
    expect(result.stderr).toMatch(says)
    // eslint-disable-next-line no-control-regex
    expect(result.stderr).not.toMatch(/[\u0000-\u0008\u000b-\u001f\u007f]/)
    expect([254, 255]).toContain(result.code)
    expect(everything(lab.client.outside("/root/p"), /^\.git\/edict/)).toEqual(before)
  })
})

// ── The pieces ───

test.each([
  ["a", undefined],
  ["a/b.c", undefined],
  ["gitignore", undefined],
  [".gitignore", undefined],
  [".github/x", undefined],
  ["git~x", undefined],
  ["x.git", undefined],
  ["a/..b/c..", undefined],
  ["-rf", undefined],
  ["new\nline", undefined],
  ["", "is no path inside the tree"],
  [".", "is no path inside the tree"],
  ["..", "is no path inside the tree"],
  ["../x", "is no path inside the tree"],
  ["a/../x", "is no path inside the tree"],
  ["a/..", "is no path inside the tree"],
  ["/a", "is no path inside the tree"],
  ["a//b", "is no path inside the tree"],
  ["a/", "is no path inside the tree"],
  ["a/./b", "is no path inside the tree"],
  ["a\0b", "holds a NUL"],
  [".git", "lies in a .git"],
  [".git/x", "lies in a .git"],
  ["a/.git/x", "lies in a .git"],
  [".GIT/x", "lies in a .git"],
  [".giT", "lies in a .git"],
  ["git~1/x", "lies in a .git"],
  ["GIT~12", "lies in a .git"],
  [".git./x", "lies in a .git"],
  [".git .. /x", "lies in a .git"],
  [".git:stream/x", "lies in a .git"],
  [".git::$INDEX_ALLOCATION", "lies in a .git"],
  [".g\u200cit/x", "lies in a .git"],
  ["\ufeff.git/x", "lies in a .git"],
  [".gi\u202et", "lies in a .git"],
  [".git\u206a/hooks", "lies in a .git"],
])("unsafeName(%j)", (name, why) => {
  expect(unsafeName(bytes(name))).toBe(why)
})

const change = (what: string, type: string, name: string, more: object = {}) => ({
  name,
  what,
  type,
  mode: 0o644,
  size: 3,
  modeOnly: false,
  target: undefined,
  ...more,
})
test.each([
  ["created", ["+f644/1/3/1.5/1.5/./a"], [change("created", "file", "a")]],
  ["deleted", ["-f644/1/3/1.5/1.5/./a/b"], [change("deleted", "file", "a/b", { size: 0 })]],
  ["content changed", ["+f644/1/3/2.5/2.5/./a", "-f644/1/9/1.5/1.5/./a"], [change("changed", "file", "a")]],
  [
    "mode alone",
    ["+f755/1/3/1.5/2.5/./a", "-f644/1/3/1.5/1.5/./a"],
    [change("changed", "file", "a", { mode: 0o755, modeOnly: true })],
  ],
  ["touched", ["+f644/1/3/2.5/2.5/./a", "-f644/1/3/1.5/1.5/./a"], [change("changed", "file", "a")]],
  ["another inode", ["-f644/1/3/1.5/1.5/./a", "+f644/2/3/1.5/2.5/./a"], [change("changed", "file", "a")]],
  [
    "a link and its text",
    ["t../x", "n./l", "+l777/1/3/1.5/1.5/./l"],
    [change("created", "link", "l", { mode: 0o777, target: "../x" })],
  ],
  ["a directory", ["+d/////./d"], [change("created", "directory", "d", { mode: NaN, size: 0 })]],
  ["the root is no change", ["+d/////."], []],
  ["a newline in a name", ["+f644/1/3/1.5/1.5/./a\u0001b"], [change("created", "file", "a\nb")]],
  ["slashes after the numbers", ["+f644/1/3/1.5/1.5/./a/b/c"], [change("created", "file", "a/b/c")]],
  ["a setuid bit", ["+f4755/1/3/1.5/1.5/./a"], [change("created", "file", "a", { mode: 0o4755 })]],
  ["a fifo", ["+p644/1/0/1.5/1.5/./a"], [change("created", "other", "a", { size: 0 })]],
  [
    "stat's hexadecimal modes",
    ["+x81ed/1/3/1.5/1.5/./a", "+xa1ff/1/3/1/1/./l", "+x1180/1/0/1/1/./p"],
    [
      change("created", "file", "a", { mode: 0o755 }),
      change("created", "link", "l", { mode: 0o777 }),
      change("created", "other", "p", { mode: 0o600, size: 0 }),
    ],
  ],
  [
    "names outside are not mended",
    ["+f644/1/3/1.5/1.5/../a", "+f644/1/3/1.5/1.5//etc/x"],
    [change("created", "file", "../a"), change("created", "file", "/etc/x")],
  ],
  [
    "a size that is none",
    ["+f644/1/-9/1.5/1.5/./a", "+f644/1/9e99/1.5/1.5/./b"],
    [change("created", "file", "a", { size: 0 }), change("created", "file", "b", { size: 0 })],
  ],
  ["lines of no kind", ["", "x", "t", "n", "+", "-", "garbage/1/2"], []],
])("parseChanges: %s", (_, lines, expected) => {
  const changes = parseChanges(lines)
  expect(changes.map((one) => ({ ...one, mode: one.type === "directory" ? NaN : one.mode }))).toEqual(
    expected as never,
  )
})

const entry = (hash: string, more: Partial<Entry> = {}): Entry => ({
  type: "file",
  mode: 0o644,
  identity: "",
  hash,
  ...more,
})
const directory = entry("", { type: "directory" })
test.each([
  ["equal", { a: entry("1") }, { a: entry("1") }, [], [], []],
  ["identity is not compared", { a: entry("1", { identity: "x" }) }, { a: entry("1") }, [], [], []],
  ["new", {}, { a: entry("1") }, ["a"], [], []],
  ["content", { a: entry("1") }, { a: entry("2") }, ["a"], [], []],
  ["mode", { a: entry("1") }, { a: entry("1", { mode: 0o755 }) }, ["a"], [], []],
  [
    "mode of a link",
    { a: entry("1", { type: "link" }) },
    { a: entry("1", { type: "link", mode: 0o777 }) },
    [],
    [],
    [],
  ],
  ["gone, with its directories", { "a/b/c": entry("1") }, {}, [], ["a/b/c"], ["a/b", "a"]],
  ["gone beside another", { "a/b": entry("1"), "a/c": entry("1") }, { "a/c": entry("1") }, [], ["a/b"], []],
  ["file to link", { a: entry("1") }, { a: entry("1", { type: "link" }) }, ["a"], ["a"], []],
  ["file to directory", { a: entry("1") }, { a: directory, "a/b": entry("1") }, ["a", "a/b"], ["a"], []],
  ["directory to file", { a: directory, "a/b": entry("1") }, { a: entry("1") }, ["a"], ["a/b"], ["a"]],
  ["directory to file, in git", { "a/b": entry("1") }, { a: entry("1") }, ["a"], ["a/b"], ["a"]],
  ["an empty directory gone", { a: directory }, {}, [], [], ["a"]],
])("compareTrees: %s", (_, before, now, send, remove, removeDirectories) => {
  const sources = Object.entries(now).map(
    ([name, one]) => [name, { name, root: "/", inner: name, seen: "", entry: one }] as const,
  )
  const delta = compareTrees(new Map(Object.entries(before as Record<string, Entry>)), new Map(sources))
  expect({ ...delta, send: delta.send.map(({ name }) => name) }).toEqual({ send, remove, removeDirectories })
})

test.each([
  [0o644, 0o755, 0o755],
  [0o644, 0o700, 0o755],
  [0o600, 0o755, 0o700],
  [0o640, 0o711, 0o750],
  [0o755, 0o644, 0o644],
  [0o700, 0o666, 0o600],
  [0o755, 0o011, 0o644],
  [0o400, 0o100, 0o500],
])("withExecutable(%o, %o)", (mode, theirs, expected) => {
  expect(withExecutable(mode, theirs)).toBe(expected)
})

test("84 names that a file system without case takes for one", () => {
  const names = ["foo", "Foo", "b/x", "B/x", "caf\u00e9", "cafe\u0301", "other"].map(bytes)
  expect(collisions(names)).toEqual(
    new Map([
      ["foo", "Foo"],
      ["b/x", "B/x"],
      [bytes("caf\u00e9"), bytes("cafe\u0301")],
    ]),
  )
})

const OID = "0123456789012345678901234567890123456789"
test.each([
  ["a branch", `G+r${OID} refs/heads/main`, ["refs/heads/main"]],
  ["a tag", `G+r${OID} refs/tags/v1`, ["refs/tags/v1"]],
  ["a remote's branch", `G+r${OID} refs/remotes/origin/main`, []],
  ["HEAD", `G+r${OID} HEAD`, []],
  ["a notes ref", `G+r${OID} refs/notes/x`, []],
  ["up and out", `G+r${OID} refs/heads/../../config`, []],
  ["a dotted part", `G+r${OID} refs/heads/.x`, []],
  ["a lock", `G+r${OID} refs/heads/x.lock`, []],
  ["an option", `G+r${OID} refs/heads/-x`, []],
  ["a blank", `G+r${OID} refs/heads/a b`, []],
  ["a control character", `G+r${OID} refs/heads/a\u001bb`, []],
  ["a pattern", `G+r${OID} refs/heads/*`, []],
  ["no object", "G+rmaster refs/heads/main", []],
  ["an option for an object", "G+r--all refs/heads/main", []],
])("79 parseGitChanges: %s", (_, line, names) => {
  expect(parseGitChanges([line]).refs.map(({ name }) => name)).toEqual(names)
})

test.each([
  ["plain ünï", "plain ünï"],
  ["\u001b[31mred", "\\x1b[31mred"],
  ["a\nb\tc\r", "a\\x0ab\\x09c\\x0d"],
  ["\u009b1m", "\\x9b1m"],
  ["\u202eabc\u200b", "\\u202eabc\\u200b"],
])("shown(%j)", (word, expected) => {
  expect(shown(word)).toBe(expected)
})

// Messages where users get stuck: recognised, explained in one line with what to do, and left as they are.
import { afterAll, beforeAll, describe, expect, test } from "bun:test"
import { readFileSync } from "node:fs"
import { explain, sshError, TROUBLE_MARKS, type Speaker } from "../edict"
import { SYSTEM } from "./lab/flake"
import { nixAvailable, type Host, type NixVersion, type Result } from "./lab/lab"
import { project, type Project } from "./support"

const VERSIONS: NixVersion[] = ["2.8", "2.26", "2.34"]
const available = new Map(
  await Promise.all(VERSIONS.map(async (nix) => [nix, (await nixAvailable(nix)) === true] as const)),
)

const HOST = { name: "big", destination: "root@big" }

/** What some program said, word for word, and what edict must make of it. */
type Sample = [from: string, by: Speaker, text: string, means: RegExp | string, remedy: RegExp | string]

const GIT_FAILED = `fatal: Could not read from remote repository.

Please make sure you have the correct access rights
and the repository exists.
error: program 'git' failed with exit code 128
(use '--show-trace' to show detailed location information)`
const GIT_FAILED_226 = `fatal: Could not read from remote repository.

Please make sure you have the correct access rights
and the repository exists.
warning: could not read HEAD ref from repo at 'ssh://root@127.0.0.1:26807/root/dep', using 'master'
error:
       … while fetching the input 'git+ssh://root@127.0.0.1:26807/root/dep'

       error: resolving Git reference 'master': revspec 'master' not found`
const CHANGED_KEY = `@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@
@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @
@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@
IT IS POSSIBLE THAT SOMEONE IS DOING SOMETHING NASTY!
Offending ED25519 key in /root/.ssh/known_hosts:1
  remove with:
  ssh-keygen -f "/root/.ssh/known_hosts" -R "[127.0.0.1]:25907"
Host key for [127.0.0.1]:25907 has changed and you have requested strict checking.
Host key verification failed.
`
const RATE_LIMIT = `{"message":"API rate limit exceeded for 203.0.113.7. (But here's the good news: Authenticated requests get a higher rate limit.)"}`
const GIT_USAGE = `warning: Not a git repository. Use --no-index to compare two paths outside a working tree
usage: git diff --no-index [<options>] <path> <path>
error: program 'git' failed with exit code 129`
const SQLITE_FULL = `error: setting journal mode: database or disk is full, database or disk is full (in '/nix/var/nix/db/db.sqlite')`
const SUDO = `sudo: a terminal is required to read the password; either use the -S option to read from standard input or configure an askpass helper
sudo: a password is required`

const SEND = /send-inputs = true in \[hosts\.big\]/
const LEND = /^-A, which lends it your ssh agent; or send-inputs = true in \[hosts\.big\]/

const SSH: Sample[] = [
  [
    "OpenSSH 9.2",
    "ssh",
    "ssh: Could not resolve hostname nowhere: Name or service not known\r\n",
    "",
    "check the name",
  ],
  [
    "OpenSSH, changed key",
    "ssh",
    CHANGED_KEY,
    "",
    /ssh-keygen -R '\[127\.0\.0\.1\]:25907' && ssh root@big true/,
  ],
  [
    "OpenSSH, unknown key",
    "ssh",
    "No ED25519 host key is known for [127.0.0.1]:25907 and you have requested strict checking.\nHost key verification failed.\n",
    "",
    /^ssh root@big true /,
  ],
  ["OpenSSH, no key", "ssh", "root@big: Permission denied (publickey).\n", "", /ssh-copy-id/],
  [
    "OpenSSH, many keys",
    "ssh",
    "Received disconnect from 192.0.2.1 port 22:2: Too many authentication failures\n",
    "",
    /IdentitiesOnly/,
  ],
  [
    "OpenSSH, refused",
    "ssh",
    "ssh: connect to host 127.0.0.1 port 1: Connection refused\n",
    "",
    /^ssh -v root@big true/,
  ],
  [
    "OpenSSH, no answer",
    "ssh",
    "ssh: connect to host 192.0.2.1 port 22: Connection timed out\n",
    "",
    /^ssh -v root@big true/,
  ],
  [
    "OpenSSH, no way",
    "ssh",
    "ssh: connect to host 192.0.2.1 port 22: No route to host\n",
    "",
    /^ssh -v root@big true/,
  ],
  [
    "OpenSSH, no answer to the greeting",
    "ssh",
    "Connection timed out during banner exchange\nConnection to 192.0.2.1 port 22 timed out\n",
    "",
    /^ssh -v/,
  ],
  [
    "OpenSSH, thrown out",
    "ssh",
    "kex_exchange_identification: Connection closed by remote host\n",
    "",
    /^ssh -v/,
  ],
  ["OpenSSH, reset", "ssh", "client_loop: send disconnect: Connection reset by peer\n", "", /^ssh -v/],
  [
    "OpenSSH, MaxSessions 0",
    "ssh",
    "mux_client_request_session: session request failed: Session open refused by peer\nchannel 0: open failed: connect failed: open failed\n",
    "",
    /MaxSessions 10 in sshd_config on big/,
  ],
  [
    "OpenSSH, MaxSessions 1",
    "command",
    "mux_client_request_session: session request failed: Session open refused by peer\n",
    /big takes too few sessions/,
    /MaxSessions 10/,
  ],
]

const STEPS: Sample[] = [
  [
    "rsync 3.5",
    "step",
    `rsync: [receiver] write failed on "/root/x/big": No space left on device (28)\nrsync error: error in file IO (code 11) at receiver.c(371) [receiver=3.5.0]`,
    "no space left on big",
    "free some space on big: ssh root@big nix-collect-garbage, or edict --clean big",
  ],
  [
    "tar",
    "step",
    "tar: ./big: Wrote only 2048 of 10240 bytes\ntar: ./big: Cannot write: No space left on device",
    /no space/,
    /free some space/,
  ],
  [
    "quota",
    "step",
    `rsync: [receiver] mkstemp "/home/u/.x.AAAA" failed: Disk quota exceeded (122)`,
    /no space/,
    /free some space/,
  ],
  [
    "Nix 2.8, import",
    "step",
    "error: cannot add path '/nix/store/n630vxbi2qlvnnl8qqddmzygavm2kvm8-zz' because it lacks a valid signature",
    "",
    /--no-link/,
  ],
  [
    "Nix 2.26, import",
    "step",
    "error: cannot add path '/nix/store/n630vxbi2qlvnnl8qqddmzygavm2kvm8-zz' because it lacks a signature by a trusted key",
    "",
    /--no-link/,
  ],
  [
    "Nix, daemon",
    "step",
    "error: cannot connect to socket at '/nix/var/nix/daemon-socket/socket': Connection refused",
    /daemon/,
    /systemctl start nix-daemon/,
  ],
  ["sudo 1.9", "step", SUDO, /sudo/, /NOPASSWD in sudoers/],
  [
    "dash",
    "step",
    "/bin/sh: 1: eval: nix-store: not found",
    "",
    "install nix-store on big, or put it on the PATH of a non-interactive shell there",
  ],
  ["zsh", "step", "zsh:1: command not found: nix-store", "", /^install nix-store on big/],
  [
    "fish 3",
    "step",
    "fish: Unknown command: nix-store\nfish: \nnix-store --serve",
    "",
    /^install nix-store on big/,
  ],
  ["bash as sh", "step", "/bin/sh: line 4: nix-store: command not found", "", /^install nix-store on big/],
  [
    "rsync, a shell that talks",
    "step",
    "protocol version mismatch -- is your shell clean?\n(see the rsync manpage for an explanation)",
    "",
    /must print nothing/,
  ],
  [
    "git 2.39",
    "step",
    "fatal: detected dubious ownership in repository at '/root/my r'\nTo add an exception for this directory, call:",
    /^\/root\/my r belongs to another user on big/,
    "ssh root@big git config --global --add safe.directory '/root/my r'   # or chown it",
  ],
]

const COMMANDS: Sample[] = [
  [
    "Nix 2.8",
    "command",
    "error: writing to file: No space left on device",
    "no space left on big",
    /ssh root@big nix-collect-garbage, or edict --clean big/,
  ],
  ["Nix 2.34", "command", SQLITE_FULL, "no space left on big", /nix-collect-garbage/],
  ["a program", "command", "cp: error writing 'x': Disk quota exceeded", /no space/, /nix-collect-garbage/],
  [
    "Nix 2.8",
    "command",
    "copying path '/nix/store/n630vxbi2qlvnnl8qqddmzygavm2kvm8-zz' from 'file:///tmp/cache'...\nerror: cannot add path '/nix/store/n630vxbi2qlvnnl8qqddmzygavm2kvm8-zz' because it lacks a valid signature",
    /takes only signed paths from your user there/,
    /trusted-public-keys.* the same as root there$/,
  ],
  [
    "Nix 2.34",
    "command",
    "error: cannot add path '/nix/store/n630vxbi2qlvnnl8qqddmzygavm2kvm8-zz' because it lacks a signature by a trusted key",
    /takes only signed paths from your user there/,
    /nix store sign/,
  ],
  [
    "Nix 2.8",
    "command",
    "error: experimental Nix feature 'nix-command' is disabled; use '--extra-experimental-features nix-command' to override",
    "Nix on big has nix-command turned off",
    /^--extra-experimental-features nix-command, or .* \/etc\/nix\/nix\.conf on big/,
  ],
  [
    "Nix 2.34",
    "command",
    "       error: experimental Nix feature 'ca-derivations' is disabled; add '--extra-experimental-features ca-derivations' to enable it",
    "Nix on big has ca-derivations turned off",
    /ca-derivations/,
  ],
  ["Nix 2.8", "command", GIT_USAGE, /git on big will not read a repository/, /safe\.directory/],
  [
    "Nix 2.26",
    "command",
    `       error: opening Git repository "/tmp/r": repository path '/tmp/r' is not owned by current user`,
    "/tmp/r belongs to another user on big, and git will not read it",
    "ssh root@big git config --global --add safe.directory /tmp/r   # or chown it",
  ],
  [
    "Nix 2.34",
    "command",
    `       error: opening Git repository "/tmp/r": repository path '/tmp/r' is not owned by current user (libgit2 error code = 7)`,
    /^\/tmp\/r belongs to another user/,
    /safe\.directory \/tmp\/r /,
  ],
  [
    "git 2.35",
    "command",
    "fatal: unsafe repository ('/tmp/r' is owned by someone else)\nTo add an exception for this directory, call:",
    /^\/tmp\/r belongs to another user/,
    /safe\.directory \/tmp\/r /,
  ],
  [
    "git 2.39",
    "command",
    "fatal: detected dubious ownership in repository at '/tmp/r'",
    /^\/tmp\/r belongs to another user/,
    /safe\.directory \/tmp\/r /,
  ],
  [
    "Nix 2.26",
    "command",
    "error: a 'riscv64-linux' with features {} is required to build '/nix/store/nmncrznv2lkip6l5q2diz4n33w5pwqwg-w.drv', but I am a 'x86_64-linux' with features {benchmark, big-parallel, kvm, nixos-test, uid-range}",
    "this is for riscv64-linux, and big is a x86_64-linux",
    /^edict --pick --system riscv64-linux @all …/,
  ],
  [
    "Nix 2.8",
    "command",
    "error: a 'x86_64-linux' with features {kvm2, big} is required to build '/nix/store/nrlzannnbqc5fx73c8wrp41rrqh6yyh8-f.drv', but I am a 'x86_64-linux' with features {benchmark, big-parallel, kvm, nixos-test}",
    "big lacks one of the system features kvm2, big",
    /^edict --pick --features kvm2,big @all …/,
  ],
  [
    "Nix 2.34",
    "command",
    "error: Cannot build '/nix/store/nmncrznv2lkip6l5q2diz4n33w5pwqwg-w.drv'.\n       Reason: platform mismatch\n       Required system: 'riscv64-linux'\n       Current system: 'x86_64-linux'",
    /^this is for riscv64-linux/,
    /--system riscv64-linux/,
  ],
  [
    "Nix 2.34",
    "command",
    "error: Cannot build '/nix/store/nrlzannnbqc5fx73c8wrp41rrqh6yyh8-f.drv'.\n       Reason: missing system features\n       Required features: {kvm2}\n       Available features: {benchmark, kvm}",
    /lacks one of the system features kvm2/,
    /--features kvm2/,
  ],
  [
    "Nix 2.8",
    "command",
    `error: unable to download 'https://api.github.com/repos/NixOS/nixpkgs/commits/HEAD': HTTP error 403 ('')\n\n       response body:\n\n       ${RATE_LIMIT}`,
    /rate limit/,
    /^access-tokens = github\.com=TOKEN in ~\/\.config\/nix\/nix\.conf on big; or send-inputs/,
  ],
  [
    "Nix 2.34",
    "command",
    `       error: Failed to open archive (Source threw exception: error: unable to download 'https://api.github.com/x': HTTP error 403\n\n              response body:\n\n              ${RATE_LIMIT})`,
    /rate limit/,
    /access-tokens/,
  ],
  [
    "GitHub",
    "command",
    "You have exceeded a secondary rate limit. Please wait a few minutes",
    /rate limit/,
    SEND,
  ],
  ["a server", "command", "error: unable to download 'https://x/y': HTTP error 429", /rate limit/, SEND],
  [
    "git in Nix 2.8, no key known",
    "command",
    `Host key verification failed.\n${GIT_FAILED}`,
    /does not know the host key/,
    SEND,
  ],
  [
    "git in Nix 2.8, no key",
    "command",
    `root@127.0.0.1: Permission denied (publickey).\n${GIT_FAILED}`,
    /no key for the server/,
    LEND,
  ],
  [
    "git in Nix 2.26, no key",
    "command",
    `git@github.com: Permission denied (publickey,password).\n${GIT_FAILED_226}`,
    /no key for the server/,
    LEND,
  ],
  [
    "git in Nix 2.8, no name",
    "command",
    `ssh: Could not resolve hostname nowhere.invalid: Name or service not known\n${GIT_FAILED}`,
    /does not reach a server/,
    SEND,
  ],
  [
    "git in Nix 2.8, refused",
    "command",
    `ssh: connect to host 127.0.0.1 port 1: Connection refused\n${GIT_FAILED}`,
    /does not reach a server/,
    SEND,
  ],
  [
    "git, https",
    "command",
    "fatal: unable to access 'https://nowhere.invalid/root/dep/': Could not resolve host: nowhere.invalid",
    /does not reach a server/,
    SEND,
  ],
  [
    "GitHub by ssh",
    "command",
    `ERROR: Repository not found.\n${GIT_FAILED}`,
    /may not read the repository/,
    LEND,
  ],
  ["git by ssh", "command", `hint: something else\n${GIT_FAILED}`, /may not read the repository/, LEND],
  [
    "Nix 2.8, no name",
    "command",
    "error: unable to download 'https://nowhere.invalid/x.tar.gz': Couldn't resolve host name (6)",
    /does not reach a server/,
    SEND,
  ],
  [
    "Nix 2.34, no name",
    "command",
    "       error: Failed to open archive (Source threw exception: error: unable to download 'https://nowhere.invalid/x.tar.gz': Could not resolve hostname (6) Could not resolve host: nowhere.invalid)",
    /does not reach a server/,
    SEND,
  ],
  [
    "Nix 2.8, 401",
    "command",
    "error: unable to download 'http://127.0.0.1:38983/401/x.tar.gz': HTTP error 401 ('Unauthorized')",
    /no token or password/,
    SEND,
  ],
  [
    "Nix 2.26, 404",
    "command",
    "       error: Failed to open archive (Source threw exception: error: unable to download 'http://127.0.0.1:38983/404/x.tar.gz': HTTP error 404",
    /no token or password/,
    SEND,
  ],
  [
    "git in Nix, 401",
    "command",
    "fatal: could not read Username for 'http://127.0.0.1:38983': No such device or address",
    /no token or password/,
    SEND,
  ],
  [
    "git in Nix, 403",
    "command",
    "fatal: unable to access 'http://127.0.0.1:38983/403/x.git/': The requested URL returned error: 403",
    /no token or password/,
    SEND,
  ],
  [
    "git in Nix, 404",
    "command",
    "fatal: repository 'http://127.0.0.1:38983/404/x.git/' not found",
    /no token or password/,
    SEND,
  ],
  [
    "Nix 2.8, git+file",
    "command",
    `fatal: '/srv/none' does not appear to be a git repository\n${GIT_FAILED}`,
    "there is no repository /srv/none on big",
    SEND,
  ],
  [
    "Nix 2.34, git+file",
    "command",
    `       error: Git repository "/srv/none" does not exist.`,
    "there is no repository /srv/none on big",
    SEND,
  ],
  [
    "Nix 2.8",
    "command",
    "error: getting the HEAD of the Git tree '/root/r' failed with exit code 1:\n       error: executing 'git': No such file or directory",
    "no git on big, and Nix needs it there",
    /nixpkgs#git/,
  ],
  [
    "Nix 2.34",
    "command",
    '\x1b[31;1merror:\x1b[0m executing \x1b[35;1m"git"\x1b[0m: \x1b[35;1mNo such file or directory\x1b[0m',
    /no git on big/,
    /nixpkgs#git/,
  ],
  [
    "Nix 2.34",
    "command",
    "       error: cannot connect to socket at '/nix/var/nix/daemon-socket/socket': No such file or directory",
    "the Nix daemon on big does not run",
    "systemctl start nix-daemon on big",
  ],
  [
    "Nix 2.8, no daemon",
    "command",
    "error: could not set permissions on '/nix/var/nix/profiles/per-user' to 755: Operation not permitted",
    /may not write to its store/,
    /edict USER@big/,
  ],
  [
    "Nix 2.26, no daemon",
    "command",
    "error: opening lock file '/nix/var/nix/db/big-lock': Permission denied",
    /may not write to its store/,
    /nix-daemon/,
  ],
  [
    "Nix 2.34, no daemon",
    "command",
    `       error: opening lock file "/nix/var/nix/db/big-lock": Permission denied`,
    /may not write to its store/,
    /nix-daemon/,
  ],
  ["sudo 1.9", "command", SUDO, /sudo on big asks for a password/, /^edict --tty big …, or NOPASSWD/],
  ["sudo 1.8", "command", "sudo: no tty present and no askpass program specified", /sudo on big/, /--tty/],
  ["Nix", "command", "error: unexpected EOF reading a line", /asked a question/, /--accept-flake-config/],
  [
    "Nix 2.8",
    "command",
    "warning: ignoring untrusted flake configuration setting 'extra-substituters'",
    /passed over settings of the flake \(nixConfig\), extra-substituters for one/,
    /--accept-flake-config/,
  ],
  [
    "Nix 2.34",
    "command",
    "warning: ignoring untrusted flake configuration setting 'sandbox'.\nPass '--accept-flake-config' to trust it",
    /sandbox for one/,
    /--accept-flake-config/,
  ],
  [
    "Nix 2.8",
    "command",
    "warning: ignoring untrusted substituter 'https://cache.example.org'",
    /https:\/\/cache\.example\.org was not asked/,
    /trusted-substituters = https:\/\/cache\.example\.org in \/etc\/nix\/nix\.conf on big.* the same as root there$/,
  ],
  [
    "Nix 2.26",
    "command",
    "warning: ignoring untrusted substituter 'https://cache.example.org', you are not a trusted user.\nRun `man nix.conf` for more information on the `substituters` configuration option.",
    /was not asked/,
    /trusted-substituters/,
  ],
  [
    "Nix 2.26",
    "command",
    "warning: ignoring the client-specified setting 'sandbox', because it is a restricted setting and you are not a trusted user",
    /does not let your user there set sandbox/,
    /set sandbox in \/etc\/nix\/nix\.conf on big/,
  ],
]

/** The lines of a text that grep lets through to edict, as a run does it. */
function heard(text: string): string {
  const marks = TROUBLE_MARKS.flatMap((mark) => ["-e", mark])
  const grep = Bun.spawnSync(["grep", "-aF", ...marks], {
    stdin: Buffer.from(`${text}\n`),
    env: { LC_ALL: "C", PATH: process.env["PATH"]! },
  })
  return grep.stdout.toString()
}

/** The same text as Nix prints it to a terminal. */
const coloured = (text: string): string =>
  text.includes("\x1b")
    ? text
    : `\r\x1b[K${text
        .replaceAll("error:", "\x1b[31;1merror:\x1b[0m")
        .replace(/'([^']*)'/g, "'\x1b[35;1m$1\x1b[0m'")
        .replaceAll("\n", "\r\n")}`

describe("each is explained", () => {
  test.each([...SSH, ...STEPS, ...COMMANDS])("%s, %s, %#", (_, by, text, means, remedy) => {
    const [first] = explain(text, { by, host: HOST })
    expect(first?.means).toMatch(means)
    expect(first?.remedy).toMatch(remedy)
    expect(text.replace(/\x1b\[[\d;]*m/g, "")).toContain(first!.line)
    expect(first!.means + first!.remedy).not.toContain("\n")
  })

  test.each(COMMANDS)("as it is heard in a run: %s, %s, %#", (_, by, text) => {
    const wanted = explain(text, { by, host: HOST })
    expect(explain(heard(text), { by, host: HOST })[0]).toEqual(wanted[0]!)
    const onTerminal = explain(heard(coloured(text).replaceAll("\r", "\n")), { by, host: HOST })
    expect(onTerminal[0]).toEqual(wanted[0]!)
  })

  test("no mark is without a sample", () => {
    const all = [...SSH, ...COMMANDS].map(([, , text]) => text).join("\n")
    expect(TROUBLE_MARKS.filter((mark) => !all.includes(mark))).toEqual([])
  })

  const nothing: [Speaker, string][] = [
    ["command", ""],
    [
      "command",
      "error: attribute 'x' missing\nerror: builder for '/nix/store/x.drv' failed with exit code 1",
    ],
    ["command", "test of No-space: passed\nsudo: no such thing\nexecuting 'git': fine"],
    // What Nix goes on after, and what a build says in its log.
    [
      "command",
      "error (ignored): error: unable to download 'https://github.com/x.json': Couldn't resolve host name (6)",
    ],
    [
      "command",
      "warning: error: unable to download 'https://c/nix-cache-info': Could not resolve hostname (6); retrying in 268 ms",
    ],
    ["command", "       > curl: (6) Could not resolve host: example.org"],
    ["step", "error: path '/nix/store/x' is not valid"],
    ["ssh", ""],
  ]
  test.each(nothing)("%s: %j is not", (by, text) => {
    expect(explain(text, { by, host: HOST })).toEqual([])
  })

  test("the side that a step failed on", () => {
    const full = "x: No space left on device"
    const at = (where: "here" | "there" | "here or there") =>
      explain(full, { by: "step", host: HOST, where })[0]!.remedy
    expect(at("here")).toBe("free some space here")
    expect(at("here or there")).toBe("free some space on big or here")
    expect(at("there")).toStartWith("free some space on big: ")
  })

  test("-A is not proposed to who has it; a name that TOML must quote is quoted", () => {
    const denied = "root@127.0.0.1: Permission denied (publickey)."
    const host = { ...HOST, sshOptions: ["-A"] }
    expect(explain(denied, { by: "command", host })[0]!.remedy).toStartWith(
      "send-inputs = true in [hosts.big]",
    )
    const odd = explain(denied, { by: "command", host: { ...HOST, name: "root@big" } })[0]!
    expect(odd.remedy).toContain('[hosts."root@big"]')
  })

  test("nor send-inputs to who has that: what flake.lock does not have is not sent", () => {
    const failed = "fatal: could not read Username for 'https://github.com': No such device or address"
    const [first] = explain(failed, { by: "command", host: { ...HOST, sendInputs: true } })
    expect(first!.remedy).toStartWith(
      "nix flake lock here, first: send-inputs sends what flake.lock has; or access-tokens",
    )
    const denied = explain("x@y: Permission denied (publickey).", {
      by: "command",
      host: { ...HOST, sendInputs: true },
    })
    expect(denied[0]!.remedy).toStartWith("-A, which lends it your ssh agent; or nix flake lock here, first")
  })

  test("what a host says cannot write to the terminal, nor become shell text", () => {
    const text = "fatal: detected dubious ownership in repository at '/tmp/\x1b]0;x\x07$(touch pwned)'"
    const [first] = explain(text, { by: "command", host: HOST })
    expect(first!.means + first!.remedy).not.toMatch(/[\x00-\x1f]/)
    expect(first!.remedy).toContain("safe.directory '/tmp/")
  })

  test("an error of ssh keeps the line that tells, whatever stands behind it", () => {
    const error = sshError(HOST, CHANGED_KEY)
    expect(error.message).toBe(
      "cannot reach big: Host key for [127.0.0.1]:25907 has changed and you have requested strict checking.",
    )
    expect(error.exitCode).toBe(255)
    expect(sshError(HOST, "").message).toBe("cannot reach big: ssh failed")
  })
})

// ── For real ───

const ownLines = (stderr: string): string[] => stderr.split("\n").filter((line) => line.startsWith("edict:"))

/** The command's own words are there, then one line of edict's, and the exit code is the command's. */
function expectExplained(result: Result, expected: { code: number; original: RegExp; says: RegExp }): void {
  const { code, original, says } = expected
  const output = result.stdout + result.stderr
  expect(output).toMatch(original)
  expect(output.split("\n").filter((line) => line.includes("edict: ") && says.test(line))).toHaveLength(1)
  expect(output.search(original)).toBeLessThan(output.search(says))
  expect(result.code).toBe(code)
}

/** Who answers every request as if it had come too often, or as its path says. */
const server = Bun.serve({
  hostname: "127.0.0.1",
  port: 0,
  fetch: ({ url }) => {
    const status = Number(/\/(\d{3})\//.exec(url)?.[1] ?? 404)
    return new Response(status === 403 ? RATE_LIMIT : "no", { status })
  },
})
afterAll(() => server.stop(true))

const NIX_CONFIG = `{ nixConfig.extra-substituters = [ "https://cache.example.org" ]; outputs = _: { value = 42; }; }`
const TRUSTING =
  "git init -q && git add -A && git -c user.name=x -c user.email=x@x commit -qm x && chown -R 4242 ."

for (const nix of VERSIONS) {
  describe.skipIf(!available.get(nix))(`Nix ${nix} over there`, () => {
    let p: Project

    beforeAll(async () => {
      p = await project({ host: { nix }, flake: { systems: [SYSTEM, "riscv64-linux"] } })
      await p.sh(`mkdir ../configured && cat >../configured/flake.nix`, { stdin: NIX_CONFIG })
      await p.host.sh(`mkdir /tmp/r && cd /tmp/r && echo '{ outputs = _: { }; }' >flake.nix && ${TRUSTING}`)
    })

    afterAll(() => p[Symbol.asyncDispose]())

    const wrongSystem = ["nix", "build", "--no-link", ".#packages.riscv64-linux.hello"]

    test("another system", async () => {
      const result = await p.edict(["h", ...wrongSystem])
      expectExplained(result, {
        code: 1,
        original: /error: (a 'riscv64-linux' with features|Cannot build)/,
        says: /edict: this is for riscv64-linux, and h is .*; try: edict --pick --system riscv64-linux/,
      })
      expect(ownLines(result.stderr)).toHaveLength(1)
    })

    test("another system, at a terminal", async () => {
      const result = await p.spawn(["h", ...wrongSystem], { tty: true }).result
      expectExplained(result, {
        code: 1,
        original: /\x1b\[31;1merror:\x1b\[0m (a '.*riscv64-linux.*' with features|Cannot build)/,
        says: /edict: this is for riscv64-linux/,
      })
    })

    test("an experimental feature", async () => {
      const words = ["nix", "--option", "experimental-features", "nix-command", "eval", ".#lib.answer"]
      expectExplained(await p.edict(["h", ...words]), {
        code: 1,
        original: /experimental Nix feature 'flakes' is disabled/,
        says: /edict: Nix on h has flakes turned off; try: --extra-experimental-features flakes, or /,
      })
    })

    test("somebody else's repository", async () => {
      const script = "cd /tmp/r && nix eval .#x"
      expectExplained(await p.edict(["h", "nix", "develop", "-c", "sh", "-c", script]), {
        code: 1,
        original: /not owned by current user|Not a git repository/,
        says: /edict: (\/tmp\/r belongs to another user on h|git on h will not read).*safe\.directory/,
      })
    })

    test("a server that has had enough of the host", async () => {
      const url = `http://127.0.0.1:${server.port}/403/x.tar.gz#value`
      expectExplained(await p.edict(["h", "nix", "eval", url]), {
        code: 1,
        original: /API rate limit exceeded for 203/,
        says: /edict: h has asked too often .*; try: access-tokens = github\.com=TOKEN .* on h; or send-inputs = true in \[hosts\.h\]/,
      })
    })

    test("settings of a flake that nobody trusts: told although all went well", async () => {
      const result = await p.edict(["h", "nix", "eval", "../configured#value"])
      expect(result.stdout).toBe("42\n")
      expectExplained(result, {
        code: 0,
        original: /ignoring untrusted flake configuration setting 'extra-substituters'/,
        says: /edict: Nix on h passed over settings of the flake \(nixConfig\), extra-substituters for one; try: --accept-flake-config/,
      })
      const again = await p.edict(["h", "nix", "eval", "../configured#value", "--accept-flake-config"])
      expect({ code: again.code, own: ownLines(again.stderr) }).toEqual({ code: 0, own: [] })
    })
  })

  describe.skipIf(!available.get(nix))(`Nix ${nix}, a user over there whom the daemon does not trust`, () => {
    let p: Project
    const EXPR = `derivation { name = "x"; system = builtins.currentSystem; builder = "/bin/sh"; args = [ "-c" "echo >$out" ]; }`

    beforeAll(async () => {
      p = await project({ host: { nix, nixConfig: ["trusted-users = root", "connect-timeout = 1"] } })
      await addUser(p.host)
      await p.host.sh(`nix --extra-experimental-features nix-command copy --to file:///tmp/cache \
        $(echo '${EXPR}' >/tmp/x.nix; nix-build --no-out-link /tmp/x.nix | tee /tmp/x) && nix-store --gc`)
    })

    afterAll(() => p[Symbol.asyncDispose]())

    test("no daemon", async () => {
      expectExplained(await p.edict(["u@h", "nix", "build", "--no-link", ".#hello"]), {
        code: 1,
        original: /Permission denied|Operation not permitted|cannot connect to socket/,
        says: /edict: (your user on u@h may not write|the Nix daemon on u@h does not run).*systemctl start nix-daemon on u@h/,
      })
    })

    test("an unsigned path, and a substituter of one's own", async () => {
      const daemon = p.host.spawn(["nix-daemon"], { timeout: 100_000 })
      await p.host.sh("until [ -S /nix/var/nix/daemon-socket/socket ]; do sleep 0.05; done")
      const path = (await p.host.sh("cat /tmp/x")).stdout.trim()
      expectExplained(await p.edict(["u@h", "nix", "copy", "--from", "file:///tmp/cache", path]), {
        code: 1,
        original: /because it lacks a (valid )?signature/,
        says: /edict: a store that u@h writes to takes only signed paths.*trusted-public-keys/,
      })
      const build = ["nix", "build", "--no-link", "--substituters", "https://cache.example.org", ".#hello"]
      expectExplained(await p.edict(["u@h", ...build]), {
        code: 0,
        original: /ignoring untrusted substituter 'https:\/\/cache\.example\.org'/,
        says: /edict: the store of u@h lets your user .*trusted-substituters = https:\/\/cache\.example\.org in \/etc\/nix\/nix\.conf on u@h/,
      })
      await daemon.kill("SIGKILL")
      await daemon.result
    })
  })
}

/** A user `u` of the host, who can log in as root can. */
async function addUser(host: Host): Promise<void> {
  const made = await host.sh(`groupadd -g 4243 u && useradd -M -d /tmp/u -u 4243 -g u -s /bin/bash -p '*' u &&
    cp -r /root /tmp/u && chown -R u:u /tmp/u`)
  if (made.code !== 0) throw new Error(made.stderr)
}

describe("with Nix 2.8 over there", () => {
  let p: Project

  beforeAll(async () => {
    p = await project({ host: { sshdConfig: ["LogLevel VERBOSE"] } })
    expect((await p.edict(["h", ...inShell("true")])).code).toBe(0)
  })

  afterAll(() => p[Symbol.asyncDispose]())

  const inShell = (script: string): string[] => ["nix", "develop", "-c", "sh", "-c", script]
  const FULL = "echo 'error: writing to file: No space left on device' >&2; exit 7"

  test("nothing is said without a failure, with -q, of an ignored line, or after Ctrl-C", async () => {
    const quiet: [string[], number][] = [
      [["h", ...inShell(FULL.replace("exit 7", "exit 0"))], 0],
      [["-q", "h", ...inShell(FULL)], 7],
      [["h", ...inShell("echo 'error (ignored): No space left on device' >&2; exit 7")], 7],
    ]
    for (const [argv, code] of quiet) {
      const result = await p.edict(argv)
      expect({ code: result.code, own: ownLines(result.stderr) }).toEqual({ code, own: [] })
      expect(result.stderr).toContain("No space left on device")
    }
    const running = p.spawn(["h", ...inShell("echo 'No space left on device' >&2; sleep 60")])
    await running.waitFor("No space left")
    await running.kill("SIGINT")
    const { code, stderr } = await running.result
    expect({ code, own: ownLines(stderr) }).toEqual({ code: 130, own: [] })
  })

  test("the first cause is told, once, and in the report", async () => {
    const script = `for _ in 1 2 3; do echo "ssh: Could not resolve hostname x: no"; done >&2; ${FULL}`
    const result = await p.edict(["--report", "/tmp/report", "h", ...inShell(script)])
    expect(result.code).toBe(7)
    expect(ownLines(result.stderr)).toEqual([
      "edict: no space left on h; try: free some space on h: ssh h nix-collect-garbage, or edict --clean h",
    ])
    const report = JSON.parse(readFileSync(p.client.outside("/tmp/report"), "utf8")) as { notes: string[] }
    expect(report.notes.filter((note) => note.startsWith("no space left on h"))).toHaveLength(1)
  })

  test("stderr comes byte for byte, in one's own file, behind what is in it", async () => {
    await p.host.sh("head -c 3000000 /dev/urandom >/tmp/random")
    const run = await p.sh(`echo before >/tmp/log
      edict h nix develop -c sh -c 'printf mark >&2; cat /tmp/random >&2; exit 3' 2>>/tmp/log; echo $?`)
    expect(run.stdout).toBe("3\n")
    const log = readFileSync(p.client.outside("/tmp/log")).toString("latin1")
    const random = readFileSync(p.host.outside("/tmp/random")).toString("latin1")
    expect(log).toStartWith("before\n")
    const came = log.slice(log.indexOf("mark") + 4)
    expect(came.length).toBe(random.length)
    expect(came === random).toBeTrue()
  })

  test("stderr comes at once, without waiting for the end of a line", async () => {
    const running = p.spawn(["h", ...inShell("printf 'Name? ' >&2; read name; echo hello $name; exit 3")])
    await running.waitFor("Name? ")
    running.write("Ada\n")
    running.end()
    expect(await running.result).toMatchObject({ code: 3, stdout: "hello Ada\n" })
  })

  test("a terminal shows what it would show without", async () => {
    const running = p.spawn(["h", ...inShell("seq 1 500; test -t 1 && test -t 2 || exit 9; exit 3")], {
      tty: true,
    })
    const { code, stdout } = await running.result
    expect(code).toBe(3)
    expect(stdout).toContain(Array.from({ length: 500 }, (_, at) => `${at + 1}\r\n`).join(""))
  })

  test("stderr without line ends needs no memory for it, and is whole", async () => {
    const script = "head -c 600000000 /dev/zero | tr '\\0' a >&2; exit 3"
    const words = inShell(script)
      .map((word) => `'${word.replaceAll("'", `'\\''`)}'`)
      .join(" ")
    const run = await p.sh(`edict h ${words} 2>&1 >/dev/null | tr -dc a | wc -c`)
    expect(Number(run.stdout)).toBeGreaterThanOrEqual(600_000_000)
  })

  test("nothing that listened is left", async () => {
    const left = async () =>
      (await p.client.processes()).filter((line) => !/ControlMaster=yes|<defunct>/.test(line))
    for (let turn = 0; turn < 50 && (await left()).length > 0; turn++) await Bun.sleep(100)
    expect(await left()).toEqual([])
  })

  test("a host key that is another than last time", async () => {
    await p.client.sh(`cp .ssh/known_hosts kept && ssh-keygen -q -t ed25519 -N '' -f other &&
      sed -i "s|ssh-ed25519 .*|$(cut -d' ' -f1,2 other.pub)|" .ssh/known_hosts`)
    const result = await p.edict(["-o", "Compression=yes", "h", "nix", "eval", ".#lib.answer"])
    await p.client.sh("mv kept .ssh/known_hosts")
    expect(result).toMatchObject({ code: 255, stdout: "" })
    expect(result.stderr).toMatch(
      /^edict: cannot reach h: Host key for \[127\.0\.0\.1\]:\d+ has changed .*; try: if you know why it changed .*: ssh-keygen -R '\[127\.0\.0\.1\]:\d+' && ssh h true\n$/,
    )
  })
})

test("a full store over there", async () => {
  await using p = await project({ flake: { big: 8 << 20 } })
  await p.host.sh("mount -t tmpfs -o size=2m tmpfs /nix && nix-store --init")
  expectExplained(await p.edict(["h", "nix", "build", "--no-link", ".#big"]), {
    code: 1,
    original: /No space left on device|disk is full|disk I\/O error/,
    says: /edict: no space left on h; try: free some space on h: ssh h nix-collect-garbage/,
  })
})

describe("sessions", () => {
  test.each([
    ["0", 255, /^edict: cannot reach h: .*; try: MaxSessions 10 in sshd_config on h: /m],
    [
      "1",
      0,
      /^edict: h takes too few sessions in one connection, .*; try: MaxSessions 10 in sshd_config on h$/m,
    ],
  ])("MaxSessions %s: %d", async (count, code, says) => {
    await using p = await project({ host: { sshdConfig: [`MaxSessions ${count}`] } })
    const result = await p.edict(["h", "nix", "eval", ".#lib.answer"])
    expect(result.code).toBe(code)
    expect(result.stderr).toMatch(says)
    expect(ownLines(result.stderr)).toHaveLength(1)
  })
})

test("no git over there, and Nix 2.8", async () => {
  await using p = await project({ host: { hide: ["git"] } })
  expectExplained(await p.edict(["h", "nix", "build", "--no-link", ".#hello"]), {
    code: 1,
    original: /executing 'git': No such file or directory/,
    says: /edict: no git on h, and Nix needs it there; try: install git there/,
  })
})

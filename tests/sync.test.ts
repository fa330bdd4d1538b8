// Changes come home and nothing is lost: cases by name, set-up and expected outcome, on machines of the lab.
// What Nix makes of a tree over there (27 to 31) is in derivation.test.ts, a lying host (73 to 81) in
// hostile.test.ts, the random test (92) in fuzz.test.ts. SYNC_CASE=43 runs the cases whose name starts so.
import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test"
import fs from "node:fs"
import { join } from "node:path"
import type { HostOptions } from "./lab/lab"
import { EDICT } from "./support"
import {
  appears,
  conflictsOf,
  expectEqual,
  expectNothingLeft,
  runCase,
  snapshot,
  startLab,
  type Case,
  type Lab,
} from "./sync-lab"

setDefaultTimeout(120_000)

/** For a name that is one path here and many bytes: newline, blanks, wildcards, quotes, invalid UTF-8, long ones. */
const ODD_NAMES = String.raw`
odd() {
  printf '%s\0' ' lead' 'trail ' 'br[x]' 'st*r' 'q?mark' 'back\slash' 'br{a,b}' 'quo"te' "ap'os" '$(touch pwned)' '~' '-dash' '***' \
    ':colon' ':(top)x' '#hash' ';semicolon' '!bang' "$(printf '\303\274n\303\257/\303\247d')" 'a
b' "$(printf 'cr\rx')" "$(printf 'tab\tx')" "$(printf 'inv\377\376x')" "$(printf 'esc\033[31mx')" \
    "$(printf '%0250d' 1)" "$(printf '%0150d/%0150d' 1 2)"
}
each() { odd | xargs -0 -I{} sh -c "$1" sh {}; }
`

const upload: Case[] = [
  {
    name: "1 ignore-basic: ignored files stay here",
    setup: `printf 'node_modules/\ntarget\nresult\n.direnv\n.env\n' >.gitignore; mkdir node_modules target .direnv
      touch node_modules/x target/x .direnv/x; echo secret >.env; ln -s /nix/store/x result; echo a >a`,
    steps: [
      {
        there: {
          a: "a\n",
          ".gitignore": "node_modules/\ntarget\nresult\n.direnv\n.env\n",
          node_modules: null,
          target: null,
          result: null,
          ".direnv": null,
          ".env": null,
        },
      },
    ],
  },
  {
    name: "2 ignore-negated: what is included again goes",
    setup: `printf '*.log\n!keep.log\n/build/*\n!/build/keep\n' >.gitignore; mkdir -p build/keep build/drop; touch a.log keep.log build/keep/k build/drop/d build/x`,
    steps: [
      { there: { "keep.log": "", "build/keep/k": "", "a.log": null, "build/drop": null, "build/x": null } },
    ],
  },
  {
    name: "3 ignore-nested: sub/.gitignore includes again what its parent ignores",
    setup: `echo '*.o' >.gitignore; mkdir sub; echo '!*.o' >sub/.gitignore; touch a.o sub/b.o`,
    steps: [{ there: { "sub/b.o": "", "a.o": null } }],
  },
  {
    name: "4 info/exclude and core.excludesFile are honoured",
    setup: `echo '*.priv' >.git/info/exclude; echo '*.mine' >.git/excludes; git config core.excludesFile "$PWD/.git/excludes"; touch a.priv b.mine c`,
    steps: [{ there: { c: "", "a.priv": null, "b.mine": null } }],
  },
  {
    name: "5 tracked but ignored: goes, and its edits come home, beside an ignored cache, again and again",
    setup: `printf '*.log\ntarget/\n' >.gitignore; mkdir target; echo 1 >x.log; echo 1 >target/tracked; git add -f x.log target/tracked`,
    steps: [
      {
        command: "echo 2 >>x.log; echo 2 >>target/tracked; echo c >target/cache",
        here: { "x.log": "1\n2\n", "target/tracked": "1\n2\n", "target/cache": null },
      },
      {
        command: "echo 3 >>target/tracked",
        here: { "target/tracked": "1\n2\n3\n", "target/cache": null },
        there: { "target/cache": "c\n" },
      },
    ],
  },
  {
    name: "6 a pattern for directories leaves a file of that name alone",
    setup: `echo 'only/' >.gitignore; mkdir -p a/only; touch a/only/x only`,
    steps: [{ there: { only: "", "a/only": null } }],
  },
  {
    name: "7 names: every byte goes, and comes back",
    setup: `${ODD_NAMES} each 'mkdir -p -- "$(dirname -- "./$1")"; echo here >"./$1"'`,
    steps: [
      {
        command: `find . -name .git -prune -o -type f -exec sh -c 'for f; do echo there >>"$f"; cp "$f" "$f+"; done' sh {} + 2>/dev/null; rm -f '***+'; :`,
        proof: `${ODD_NAMES} each '[ "$(cat -- "./$1")" = "$(printf "here\\nthere")" ] || { echo "content of $1"; exit 1; }'; [ ! -e pwned ]
          each '[ "$1" = "***" ] || cmp -- "./$1" "./$1+"'`,
      },
    ],
  },
  {
    name: "8 a pattern with escapes does not catch its wildcard reading",
    setup: String.raw`printf 'st\\*r.log\nbr\\[a\\]ck.log\n' >.gitignore; touch 'st*r.log' stXr.log 'br[a]ck.log' brack.log`,
    steps: [{ there: { "stXr.log": "", "brack.log": "", "st*r.log": null, "br[a]ck.log": null } }],
  },
  {
    name: "9 deleted in the work tree, not staged: absent over there",
    setup: "touch a b",
    steps: [{ before: "rm a", there: { a: null, b: "" }, here: { a: null } }],
  },
  {
    name: "10 unmerged path in a merge in progress: goes once, and can be resolved over there",
    setup: "echo base >a",
    steps: [
      {
        before: `git checkout -qb other; echo o >a; git commit -qam o; git checkout -q -; echo m >a; git commit -qam m; git merge -q other >/dev/null || :`,
        command: "grep -q '<<<<' a && echo resolved >a",
        here: { a: "resolved\n" },
        proof: "git status --porcelain | grep -q '^[AU][AU] a$'",
      },
    ],
  },
  {
    name: "11 stale file: removed here, gone there, though an ignored directory lies beside it",
    setup: "echo node_modules >.gitignore; mkdir -p pkg/node_modules; echo 1 >pkg/f",
    steps: [
      { command: "mkdir -p pkg/node_modules; echo x >pkg/node_modules/y" },
      { before: "git rm -q pkg/f", there: { "pkg/f": null, "pkg/node_modules/y": "x\n" } },
    ],
  },
  {
    name: "12 an ignored cache over there stays there, and does not come home",
    setup: "echo target/ >.gitignore; mkdir target; echo mine >target/mine",
    steps: [
      {
        command: "mkdir -p target; echo c >target/cache",
        here: { "target/cache": null, "target/mine": "mine\n" },
        hushes: ["changed here"],
      },
      {
        command: "grep -q c target/cache; echo d >>target/cache",
        there: { "target/cache": "c\nd\n", "target/mine": null },
        hushes: ["cut off", "changed here"],
      },
      { before: "echo x >x", there: { "target/cache": "c\nd\n" } },
    ],
  },
  {
    name: "13 the same without such a directory here: it is not made here",
    setup: "echo target/ >.gitignore",
    steps: [
      { command: "mkdir -p target/deep; echo c >target/deep/cache", here: { target: null } },
      { there: { "target/deep/cache": "c\n" }, here: { target: null } },
    ],
  },
  {
    name: "14 a file that becomes ignored between runs stays here and is not brought back",
    setup: "echo 1 >log; echo a >a",
    steps: [
      { there: { log: "1\n" } },
      {
        before: "git rm -q --cached log; echo log >.gitignore",
        command: "echo there >>log; echo b >>a",
        here: { log: "1\n", a: "a\nb\n" },
      },
    ],
  },
  {
    name: "14b a directory that is no longer ignored travels again, both ways",
    setup: "echo out/ >.gitignore",
    steps: [
      { command: "mkdir out; echo c >out/c", here: { out: null } },
      {
        before: "rm .gitignore; mkdir out; echo x >out/x",
        there: { "out/x": "x\n" },
        here: { "out/c": null },
        equal: false,
      },
      { command: "echo y >>out/x; echo d >>out/c", here: { "out/x": "x\ny\n", "out/c": "c\nd\n" } },
    ],
  },
  {
    name: "15 symlinks of all kinds: their text is the same",
    setup: `mkdir d; echo x >d/x; ln -s d/x rel; ln -s /etc/hostname abs; ln -s nowhere dangling; ln -s d dir; ln -s ../../etc out; ln -s -- '-> $(x) *' odd`,
    steps: [
      {
        command: "for l in rel abs dangling dir out odd; do cp -P $l new-$l; done",
        there: {
          rel: "-> d/x",
          abs: "-> /etc/hostname",
          dangling: "-> nowhere",
          dir: "-> d",
          out: "-> ../../etc",
          odd: "-> -> $(x) *",
        },
        here: {
          "new-rel": "-> d/x",
          "new-abs": "-> /etc/hostname",
          "new-dangling": "-> nowhere",
          "new-dir": "-> d",
          "new-out": "-> ../../etc",
        },
      },
    ],
  },
  {
    name: "16 executable bits travel; umask 077 over there makes no private file here",
    setup: "printf '#!/bin/sh\n' >run; chmod +x run; echo a >a",
    steps: [
      {
        command: "umask 077; echo b >>a; echo n >new; echo x >tool; chmod 700 tool; echo '#' >>run",
        there: { run: "*#!/bin/sh\n#\n" },
        here: { run: "*#!/bin/sh\n#\n", tool: "*x\n", new: "n\n" },
        proof: `[ "$(stat -c %a a new tool run | tr '\n' ' ')" = '644 644 755 755 ' ]`,
      },
    ],
  },
  {
    name: "17 an empty directory, and one with ignored files alone: no failure, not over there",
    setup: "echo '*.o' >.gitignore; mkdir empty objects; touch objects/x.o; echo a >a",
    steps: [{ there: { empty: null, objects: null, a: "a\n" }, here: { empty: "/", "objects/x.o": "" } }],
  },
  {
    name: "18 no git repository: exactly this directory, without rules, empty directories too",
    plain: true,
    setup: "echo '*.o' >.gitignore; mkdir -p empty sub/deep; touch x.o; echo a >sub/deep/a",
    steps: [
      { there: { "x.o": "", empty: "/", "sub/deep/a": "a\n" } },
      {
        command: "rmdir empty; mkdir -p new/empty; echo b >>sub/deep/a; rm x.o",
        here: { empty: null, "new/empty": "/", "sub/deep/a": "a\nb\n", "x.o": null },
      },
      { before: "rmdir new/empty", there: { "new/empty": null, new: "/" }, hushes: ["changed here"] },
    ],
  },
  {
    name: "19 from a subdirectory: the whole repository goes, the command runs in that directory",
    setup: "mkdir -p sub/dir; echo a >top; echo b >sub/dir/b",
    steps: [
      {
        from: "sub/dir",
        command: "cat ../../top >>b; echo n >../n",
        here: { "sub/dir/b": "b\na\n", "sub/n": "n\n" },
        says: [/2 files changed here: (\.\.\/n, b|b, \.\.\/n)/],
      },
    ],
  },
  {
    name: "20 a git worktree: changes come home, conflicts lie in its own .git directory, its .git stays a file",
    directory: "work-tree",
    steps: [
      {
        before: `cd ..; rm -rf work-tree; git init -q main-20; cd main-20; echo a >a; echo b >b; git add a b; git commit -qm first; git worktree add -q ../work-tree`,
        command: "echo there >>a; echo n >n; test -d .git",
        here: { a: "a\nthere\n", n: "n\n" },
        proof: 'test -f .git; cd ../main-20; [ -z "$(git status --porcelain)" ]',
      },
      {
        command: "echo there >>b",
        meanwhile: "echo here >>b",
        code: 254,
        here: { b: "b\nhere\n" },
        says: [
          /git diff --no-index -- b \.\.\/main-20\/\.git\/worktrees\/work-tree\/edict\/conflicts\/[0-9a-f]+\/b/,
        ],
        proof: "grep -q there ../main-20/.git/worktrees/work-tree/edict/conflicts/*/b",
      },
    ],
  },
  {
    name: "21 a submodule with edits: its files travel and come home, its .git file stays",
    setup: `git init -q ../sub-21; (cd ../sub-21; echo s >s; git add s; git commit -qm s); git -c protocol.file.allow=always submodule -q add ../sub-21 sub; echo a >a`,
    steps: [
      {
        before: "echo here >>sub/s; cp sub/.git /tmp/21",
        command: "echo there >>sub/s; echo n >sub/n; echo b >>a",
        here: { "sub/s": "s\nhere\nthere\n", "sub/n": "n\n", a: "a\nb\n" },
        proof: "cmp sub/.git /tmp/21; git -C sub status --porcelain | grep -q '^ M s'",
      },
    ],
  },
  {
    name: "22 a nested untracked repository: its files travel, its ignored files and its .git do not",
    setup: "echo a >a",
    steps: [
      {
        before: `git init -q nested; cd nested; echo '*.o' >.gitignore; touch x.o; echo f >f; git config edict.mine yes`,
        command: `echo g >>nested/f; echo new >nested/new; echo o >nested/y.o; git -C nested config core.fsmonitor 'touch /tmp/pwned'; echo evil >nested/.git/hooks-x`,
        here: {
          "nested/f": "f\ng\n",
          "nested/new": "new\n",
          "nested/y.o": null,
          "nested/.git/hooks-x": null,
        },
        there: { "nested/x.o": null },
        proof: '! git -C nested config core.fsmonitor; [ "$(git -C nested config edict.mine)" = yes ]',
        equal: false,
      },
    ],
  },
  {
    name: "23 an edit of the same size in the same second, mtime restored: the second content goes",
    setup: "echo AAAA >lock",
    steps: [
      { there: { lock: "AAAA\n" } },
      { before: `m=$(stat -c %y lock); echo BBBB >lock; touch -d "$m" lock`, there: { lock: "BBBB\n" } },
      { before: `m=$(stat -c %y lock); echo CCCC >lock; touch -d "$m" lock`, there: { lock: "CCCC\n" } },
    ],
  },
]

const bringingBack: Case[] = [
  {
    name: "32 every kind of change comes home",
    setup: `echo e >edit; echo d >delete; echo m >mode; ln -s edit link; echo f >file-link; echo g >file-dir; mkdir -p dir-file/sub dir-link gone/deep
      echo 1 >dir-file/one; echo 2 >dir-file/sub/two; echo 3 >dir-link/three; ln -s edit link-file; ln -s edit link-dir; echo x >gone/deep/x; echo o >old; : >empty-file`,
    steps: [
      {
        command: `echo more >>edit; rm delete; chmod +x mode; ln -sfn mode link; ln -sfn edit file-link; rm file-dir; mkdir file-dir; echo in >file-dir/in
          rm -r dir-file dir-link gone; echo now >dir-file; ln -s edit dir-link; rm link-file link-dir; echo l >link-file; mkdir link-dir; echo in >link-dir/in
          mv old renamed; mkdir -p a/b/c d; echo new >a/b/c/new; : >nothing; echo x >empty-file`,
        here: {
          edit: "e\nmore\n",
          delete: null,
          mode: "*m\n",
          link: "-> mode",
          "file-link": "-> edit",
          "file-dir/in": "in\n",
          "dir-file": "now\n",
          "dir-link": "-> edit",
          "link-file": "l\n",
          "link-dir/in": "in\n",
          gone: null,
          old: null,
          renamed: "o\n",
          "a/b/c/new": "new\n",
          nothing: "",
          "empty-file": "x\n",
          d: "/",
        },
      },
      { command: "chmod -x mode; rmdir d; rm -r a", here: { mode: "m\n", d: null, a: null } },
    ],
  },
  {
    name: "33 an older file moved over another, cp -p and touch -r are changes all the same",
    setup:
      "echo new1 >a; echo old1 >b; touch -d 2001-01-01 b; echo AAAA >c; echo BBBB >d; touch -d 2002-02-02 c d",
    steps: [
      {
        command: "cp -p b b2; mv b2 a; cp -p d c; touch -r d keep; echo DDDD >d; touch -r keep d; rm keep",
        here: { a: "old1\n", c: "BBBB\n", d: "DDDD\n" },
      },
    ],
  },
  {
    name: "34 an edit in the same moment as the listing",
    setup: "echo AAAA >a",
    steps: [...Array(5).keys()].map((at) => ({
      command: `printf '%s\n' BBB${at} >a`,
      here: { a: `BBB${at}\n` },
    })),
  },
  {
    name: "35 touched, or rewritten with the same content: nothing is written here",
    setup: "echo a >a; echo b >b",
    steps: [
      {
        before: "stat -c '%i %Y %Z' a b >/tmp/35",
        command: "touch a; cp b c; cat c >b; mv c b",
        proof: "stat -c '%i %Y %Z' a b | cmp - /tmp/35",
        hushes: ["changed here"],
      },
    ],
  },
  {
    name: "36 a new ignored file stays there; a new directory that is not ignored comes",
    setup: "printf '*.o\nbuild/\n' >.gitignore",
    steps: [
      {
        command:
          "echo o >x.o; mkdir -p build src/deep only; echo c >src/deep/c; echo o >src/deep/c.o; echo b >build/b; echo o >only/x.o",
        here: { "x.o": null, build: null, "src/deep/c": "c\n", "src/deep/c.o": null, only: null },
        there: { "x.o": "o\n", "build/b": "b\n" },
      },
    ],
  },
  {
    name: "37 the command changes .gitignore: the rules that it leaves decide on its new files",
    setup: "echo '*.o' >.gitignore",
    steps: [
      {
        command: "echo '*.tmp' >.gitignore; echo 1 >new.tmp; echo 2 >new.o",
        here: { ".gitignore": "*.tmp\n", "new.tmp": null, "new.o": "2\n" },
      },
    ],
  },
  {
    name: "38 CRLF with a text attribute, and pointers of large files: the same bytes",
    setup:
      "printf '* text=auto\n*.bin filter=lfs\n' >.gitattributes; printf 'a\\r\\nb\\r\\n' >dos; printf 'version https://git-lfs.github.com/spec/v1\n' >x.bin",
    steps: [
      {
        command: "printf 'c\\r\\n' >>dos; printf 'oid sha256:0\\r\\n' >>x.bin",
        here: {
          dos: "a\r\nb\r\nc\r\n",
          "x.bin": "version https://git-lfs.github.com/spec/v1\noid sha256:0\r\n",
        },
        there: { dos: "a\r\nb\r\nc\r\n" },
      },
    ],
  },
  {
    name: "40 nothing changed: nothing is written here, neither in the tree nor in .git",
    setup: "mkdir d; echo a >d/a; echo b >b",
    steps: [
      {},
      {
        before: "find . -exec stat -c '%n %i %s %y %z' {} + | sort >/tmp/40",
        proof: "find . -exec stat -c '%n %i %s %y %z' {} + | sort | cmp - /tmp/40",
        hushes: ["."],
      },
    ],
  },
  {
    name: "85 files from the future, and from the past",
    setup: "echo a >a; echo b >b; touch -d '+1 hour' a; touch -d '-1 hour' b",
    steps: [
      {
        command: "echo there >>a; touch -d '+1 hour' a; echo there >>b; touch -d '-1 hour' b",
        here: { a: "a\nthere\n", b: "b\nthere\n" },
      },
      {
        before: "echo here >>a; touch -d '+1 hour' a; echo here >>b; touch -d '-1 hour' b",
        there: { a: "a\nthere\nhere\n", b: "b\nthere\nhere\n" },
      },
      { command: "echo 1 >a; touch -d '-2 hours' a", here: { a: "1\n" } },
    ],
  },
  {
    name: "41 the command fails: its changes come home, and its exit code",
    setup: "echo a >a",
    steps: [{ command: "echo b >>a; exit 3", code: 3, here: { a: "a\nb\n" }, equal: true }],
  },
]

const localWork: Case[] = [
  {
    name: "42 another file edited here meanwhile: both stay",
    setup: "echo a >a; echo b >b",
    steps: [
      {
        command: "echo there >>a",
        meanwhile: "echo here >>b; echo n >n",
        here: { a: "a\nthere\n", b: "b\nhere\n", n: "n\n" },
        there: { b: "b\n" },
        equal: false,
      },
      {},
    ],
  },
  {
    name: "43 the same file edited here: ours stays, theirs is kept, with a command that compares them",
    setup: "mkdir d; echo a >d/a",
    steps: [
      {
        from: "d",
        command: "echo there >>a",
        meanwhile: "echo here >>d/a",
        code: 254,
        here: { "d/a": "a\nhere\n" },
        kept: { "d/a": "a\nthere\n" },
        says: [
          /conflict: a was changed here and there/,
          /git diff --no-index -- a \.\.\/\.git\/edict\/conflicts\/[0-9a-f]+\/d\/a/,
        ],
      },
    ],
  },
  {
    name: "43b outside git the other version lies in .edict-conflicts, and does not travel",
    plain: true,
    setup: "echo a >a",
    steps: [
      {
        command: "echo there >>a",
        meanwhile: "echo here >>a",
        code: 254,
        here: { a: "a\nhere\n" },
        kept: { a: "a\nthere\n" },
        says: [/git diff --no-index -- a \.edict-conflicts\/[0-9a-f]+\/a/],
      },
      { kept: { a: "a\nthere\n" }, there: { a: "a\nhere\n", ".edict-conflicts": null } },
    ],
  },
  {
    name: "43c the printed command compares the two",
    setup: "echo a >'a b'",
    steps: [
      {
        command: "echo there >>'a b'",
        meanwhile: "echo here >>'a b'",
        code: 254,
        kept: { "a b": "a\nthere\n" },
        proof:
          "git diff --no-index -- 'a b' .git/edict/conflicts/*/'a b' | grep -q '^+there'; [ \"$(git status --porcelain)\" = ' M \"a b\"' ]",
      },
    ],
  },
  {
    name: "44 the same change on both sides is no conflict",
    setup: "echo a >a; ln -s a l; echo d >d",
    steps: [
      {
        command: "echo both >>a; echo n >n; ln -sfn n l; rm d",
        meanwhile: "echo both >>a; echo n >n; ln -sfn n l; rm d",
        here: { a: "a\nboth\n", n: "n\n", l: "-> n", d: null },
      },
    ],
  },
  {
    name: "45 deleted there, edited here: stays, and is said",
    setup: "echo a >a",
    steps: [
      {
        command: "rm a",
        meanwhile: "echo here >>a",
        code: 254,
        here: { a: "a\nhere\n" },
        says: [/conflict: a was changed here and deleted there/],
      },
      { there: { a: "a\nhere\n" } },
    ],
  },
  {
    name: "45b deleted there, made executable here: stays",
    setup: "echo a >a",
    steps: [{ command: "rm a", meanwhile: "chmod +x a", code: 254, here: { a: "*a\n" } }],
  },
  {
    name: "46 deleted here, edited there: stays deleted, theirs is kept",
    setup: "echo a >a",
    steps: [
      {
        command: "echo there >>a",
        meanwhile: "rm a",
        code: 254,
        here: { a: null },
        kept: { a: "a\nthere\n" },
        says: [/conflict: a was deleted here and changed there/],
      },
      { here: { a: null }, there: { a: null }, kept: { a: "a\nthere\n" } },
    ],
  },
  {
    name: "46b deleted here, only touched there: stays deleted, and nothing is said",
    setup: "echo a >a",
    steps: [
      { command: "touch a; echo a >a", meanwhile: "rm a", here: { a: null }, equal: false },
      { there: { a: null } },
    ],
  },
  {
    name: "46c edited here, only touched there: no conflict",
    setup: "echo a >a",
    steps: [
      {
        command: "touch a; cp a b; mv b a",
        meanwhile: "echo here >>a",
        here: { a: "a\nhere\n" },
        equal: false,
      },
      { there: { a: "a\nhere\n" } },
    ],
  },
  {
    name: "46d edited here, made executable there: both",
    setup: "echo a >a",
    steps: [
      { command: "chmod +x a", meanwhile: "echo here >>a", here: { a: "*a\nhere\n" }, equal: false },
      { there: { a: "*a\nhere\n" } },
    ],
  },
  {
    name: "46e made executable here, edited there: both",
    setup: "echo a >a",
    steps: [
      { command: "echo there >>a", meanwhile: "chmod +x a", here: { a: "*a\nthere\n" }, equal: false },
      { there: { a: "*a\nthere\n" } },
    ],
  },
  {
    name: "47 both make the same new name: ours stays",
    setup: ":",
    steps: [
      {
        command: "echo there >n; ln -s there l; mkdir d; echo there >d/x",
        meanwhile: "echo here >n; ln -s here l; mkdir d; echo here >d/x",
        code: 254,
        here: { n: "here\n", l: "-> here", "d/x": "here\n" },
        kept: { n: "there\n", l: "-> there", "d/x": "there\n" },
      },
    ],
  },
  {
    name: "48 a file became a directory here, edited there: a conflict, not an error",
    setup: "echo a >a; echo b >b",
    steps: [
      {
        command: "echo there >>a; echo there >>b",
        meanwhile: "rm a; mkdir a; echo in >a/in",
        code: 254,
        here: { "a/in": "in\n", b: "b\nthere\n" },
        kept: { a: "a\nthere\n" },
      },
      { there: { "a/in": "in\n" }, kept: { a: "a\nthere\n" } },
    ],
  },
  {
    name: "48b a directory became a link here, a file below it edited there: nothing goes through the link",
    setup: "mkdir d; echo x >d/x; echo y >d/y",
    steps: [
      {
        command: "echo there >>d/x; echo n >d/n; rm d/y",
        meanwhile: "mv d ../48b-moved; ln -s ../48b-moved d",
        code: 254,
        here: { d: "-> ../48b-moved" },
        kept: { "d/x": "x\nthere\n", "d/n": "n\n" },
        proof: '[ "$(cat ../48b-moved/x)" = x ]; [ ! -e ../48b-moved/n ]; [ -e ../48b-moved/y ]',
      },
    ],
  },
  {
    name: "49 a new file here in a directory that was deleted there: the directory stays",
    setup: "mkdir d; echo x >d/x",
    steps: [
      { command: "rm -r d", meanwhile: "echo n >d/n", here: { "d/n": "n\n", "d/x": null }, equal: false },
      { there: { "d/n": "n\n" } },
    ],
  },
  {
    name: "49b a new file here in a directory that became a file there: ours stays, theirs is kept",
    setup: "mkdir d; echo x >d/x",
    steps: [
      {
        command: "rm -r d; echo file >d",
        meanwhile: "echo n >d/n",
        code: 254,
        here: { "d/n": "n\n" },
        kept: { d: "file\n" },
      },
    ],
  },
  {
    name: "49c the same outside git",
    plain: true,
    setup: "mkdir d; echo x >d/x",
    steps: [
      {
        command: "rm -r d; echo file >d",
        meanwhile: "echo n >d/n",
        code: 254,
        here: { "d/n": "n\n" },
        kept: { d: "file\n" },
      },
    ],
  },
  {
    name: "49d a file that became a directory there was edited here: ours stays, theirs is kept",
    setup: "echo f >f; echo g >g",
    steps: [
      {
        command: "rm f; mkdir f; echo in >f/in",
        meanwhile: "echo here >>f",
        code: 254,
        here: { f: "f\nhere\n" },
        kept: { "f/in": "in\n" },
      },
      { there: { f: "f\nhere\n" }, kept: { "f/in": "in\n" } },
    ],
  },
  {
    name: "52 a conflict, then the next run: no second report, and our version goes",
    setup: "echo a >a; echo b >b",
    steps: [
      {
        command: "echo there >>a; echo there >>b",
        meanwhile: "echo here >>a",
        code: 254,
        kept: { a: "a\nthere\n" },
        here: { b: "b\nthere\n" },
      },
      { there: { a: "a\nhere\n" }, kept: { a: "a\nthere\n" }, hushes: ["conflict"] },
      { command: "echo again >>a", here: { a: "a\nhere\nagain\n" }, kept: { a: "a\nthere\n" } },
    ],
  },
  {
    name: "--no-sync: nothing comes home, and the next upload puts it right",
    setup: "echo a >a",
    steps: [{}, { options: ["--no-sync"], command: "true", equal: true }],
  },
  {
    name: "somebody works over there by hand: additions and edits come home, deletions are undone",
    setup: "echo a >a; echo b >b",
    steps: [
      {},
      {
        byHand: "echo there >>a; rm b; echo n >n",
        here: { a: "a\nthere\n", b: "b\n", n: "n\n" },
        there: { b: "b\n" },
      },
    ],
  },
]

const many = (count: number, what: string) => `i=0; while [ $i -lt ${count} ]; do i=$((i+1)); ${what}; done`
const crashes: Case[] = [
  {
    name: "56 the remote directory was deleted between runs: all of it goes again, nothing is deleted here",
    setup: "echo a >a; mkdir d; echo x >d/x",
    steps: [
      {},
      { byHand: `rm -rf "$PWD"`, here: { a: "a\n", "d/x": "x\n" }, there: { a: "a\n", "d/x": "x\n" } },
    ],
  },
  {
    name: "57 the state here is lost: nothing is deleted on either side",
    setup: "echo a >a",
    steps: [
      { env: { XDG_STATE_HOME: "/tmp/57" }, command: "echo n >n" },
      {
        before: "rm -rf /tmp/57",
        env: { XDG_STATE_HOME: "/tmp/57" },
        here: { a: "a\n", n: "n\n" },
        there: { a: "a\n", n: "n\n" },
      },
    ],
  },
  {
    name: "59 files that cannot be written here: said one by one, the rest is applied",
    setup: "mkdir locked; echo a >a; echo l >locked/l; echo f >fixed",
    steps: [
      {
        command:
          "echo there | tee -a a locked/l fixed >>b; echo n >locked/n; rm locked/l; echo again >locked/l",
        meanwhile: "chattr +i locked fixed",
        code: 254,
        here: { a: "a\nthere\n", b: "there\n", fixed: "f\n", "locked/l": "l\n", "locked/n": null },
        kept: { fixed: "f\nthere\n", "locked/l": "again\n", "locked/n": "n\n" },
        says: [/conflict: fixed could not be written here/, /conflict: locked\/n could not be written here/],
        proof: "chattr -i locked fixed",
      },
      {
        there: { fixed: "f\n", "locked/n": null },
        kept: { fixed: "f\nthere\n", "locked/l": "again\n", "locked/n": "n\n" },
      },
    ],
  },
  {
    name: "59b a file system of its own in the tree, too small: files are whole or not there, theirs are kept",
    setup: "mkdir small; echo s >small/s; echo t >small/t; echo u >small/u; echo a >a",
    steps: [
      {
        command:
          "echo there >>small/s; echo there >>a; head -c 200000 /dev/zero >small/big; head -c 200000 /dev/zero >>small/t; rm small/u; mkdir small/d; echo x >small/d/x",
        meanwhile:
          "mv small was; mkdir small; mount -t tmpfs -o size=64k tmpfs small; cp -p was/* small/; rm -r was",
        code: 254,
        here: { a: "a\nthere\n" },
        says: [/small\/big could not be written here/],
        kept: { "small/big": "\0".repeat(200000), "small/t": `t\n${"\0".repeat(200000)}` },
        proof: `[ "$(cat small/s small/t small/d/x | tr '\n' ' ')" = 's there t x ' ]; [ ! -e small/big ]; [ ! -e small/u ]; [ "$(ls -A small)" = "$(printf 'd\ns\nt')" ]; umount small`,
      },
    ],
  },
  {
    name: "60 mass deletion: stops, and nothing of it is applied; undone by the next run",
    setup: `${many(40, "echo $i >f$i")}; echo keep >keep`,
    steps: [
      {
        command: "rm f*; echo edit >>keep",
        code: 254,
        here: { f1: "1\n", f40: "40\n", keep: "keep\n" },
        there: { f1: null },
        says: [/deleted 40 of 41 files/, /--allow-mass-delete/],
      },
      {
        here: { f1: "1\n", keep: "keep\nedit\n" },
        there: { f1: "1\n", keep: "keep\nedit\n" },
        says: [/an earlier command deleted 40 of 41/],
      },
    ],
  },
  {
    name: "60b mass deletion: done by the next run with --allow-mass-delete, or by the same one",
    setup: `${many(40, "echo $i >f$i")}; echo keep >keep`,
    steps: [
      { command: "rm f?", here: { f1: null, f10: "10\n" } },
      { command: "rm f1? f2? f3?", code: 254, here: { f10: "10\n" } },
      {
        options: ["--allow-mass-delete"],
        here: { f10: null, f40: "40\n", keep: "keep\n" },
        there: { f10: null },
      },
      {
        before: `${many(40, "echo $i >f$i")}`,
        options: ["--allow-mass-delete"],
        command: "rm f*",
        here: { f1: null, f40: null, keep: "keep\n" },
      },
    ],
  },
  {
    name: "61 a stage that was left behind goes; what only it holds is kept; index.lock does no harm",
    setup: "echo a >a; echo b >b",
    steps: [
      {
        before: `s=.git/edict/stage/client.999999.0123456789abcdef; mkdir -p $s/apply/d $s/in; echo b >$s/apply/b; echo mine >$s/apply/d/x; echo half >$s/in/y`,
        command: "echo there >>a",
        code: 254,
        here: { a: "a\nthere\n" },
        kept: { "d/x": "mine\n" },
        says: [/d\/x was being replaced when an earlier run was killed/],
      },
      {
        before: "touch .git/index.lock",
        command: "echo more >>a",
        here: { a: "a\nthere\nmore\n" },
        kept: { "d/x": "mine\n" },
        proof: "rm .git/index.lock",
        equal: true,
      },
    ],
  },
  {
    name: "90 a path with blanks and quotes",
    directory: `b l'a"n $k`,
    setup: "echo a >a",
    steps: [{ command: "echo there >>a; echo n >'n w'", here: { a: "a\nthere\n", "n w": "n\n" } }],
  },
]

const clean = `[ -z "$(git status --porcelain)" ]; [ -z "$(git fsck --no-dangling 2>&1)" ]`
const subject = (text: string, ref = "HEAD") => `[ "$(git log -1 --format=%s ${ref})" = ${text} ]`
const commits: Case[] = [
  {
    name: "62 a commit there, nothing here: the branch moves forward, the status is clean",
    setup: "echo a >a",
    steps: [
      {
        command: "echo b >>a; echo n >n; git add n; git commit -qam there",
        here: { a: "a\nb\n", n: "n\n" },
        proof: `${subject("there")}; ${clean}; git reflog -1 | grep -q 'edict: on h'`,
      },
      {
        command: "git log --format=%s | grep -q there; echo c >>a; git commit -qam again",
        proof: `${subject("again")}; ${clean}`,
      },
    ],
  },
  {
    name: "63 a commit there, other files staged and edited here: preserved",
    setup: "echo a >a; echo w >w",
    steps: [
      {
        command: "echo b >>a; git commit -qam there",
        meanwhile: "echo s >s; git add s; echo x >>w",
        equal: false,
        here: { a: "a\nb\n", w: "w\nx\n" },
        proof: `${subject("there")}; [ "$(git status --porcelain)" = "$(printf 'A  s\n M w')" ]`,
      },
    ],
  },
  {
    name: "64 a commit there, the same path staged here: the index stays, and it is said",
    setup: "echo a >a; echo b >b",
    steps: [
      {
        command: "echo there >>a; echo there >>b; git commit -qam there",
        meanwhile: "echo here >>a; git add a",
        code: 254,
        here: { a: "a\nhere\n", b: "b\nthere\n" },
        kept: { a: "a\nthere\n" },
        says: [/conflict: a was staged here and there/],
        proof: `${subject("there")}; [ "$(git show :a)" = "$(printf 'a\nhere')" ]; [ "$(git status --porcelain)" = 'M  a' ]`,
      },
    ],
  },
  {
    name: "65 a commit on both sides: ours stays, theirs waits under refs/edict",
    setup: "echo a >a; echo b >b",
    steps: [
      {
        command: "echo there >>a; git commit -qam there",
        meanwhile: "echo here >>b; git commit -qam here",
        code: 254,
        says: [
          /refs\/heads\/main moved here meanwhile; theirs is refs\/edict\/h\/heads\/main/,
          /git merge refs\/edict\/h\/heads\/main/,
        ],
        proof: `${subject("here")}; ${subject("there", "refs/edict/h/heads/main")}; git stash -q; git merge -q refs/edict/h/heads/main -m m; grep -q there a; grep -q here b`,
      },
    ],
  },
  {
    name: "66 a branch made there; one of the same name made here, too",
    setup: "echo a >a",
    steps: [
      {
        command: "git checkout -q -b bump; git commit -q --allow-empty -m bumped; git checkout -q main",
        proof: `${subject("bumped", "bump")}; ${subject("first")}; ${clean}`,
      },
      {
        command: "git checkout -q -b two; git commit -q --allow-empty -m theirs; git checkout -q main",
        meanwhile: "git branch two",
        code: 254,
        proof: `${subject("first", "two")}; ${subject("theirs", "refs/edict/h/heads/two")}`,
      },
    ],
  },
  {
    name: "67 amended and reset there: not applied by itself",
    setup: "echo a >a",
    steps: [
      {
        command: "git commit -q --amend -m amended --allow-empty",
        code: 254,
        says: [/not forward/],
        proof: `${subject("first")}; ${subject("amended", "refs/edict/h/heads/main")}`,
      },
    ],
  },
  {
    name: "68 a tag made there comes; a branch deleted there stays here",
    setup: "echo a >a; git add -A; git commit -qm zero; git branch old",
    steps: [
      {
        command: "git tag -a v1 -m v1; git tag light; git branch -D old 2>/dev/null || :",
        proof:
          '[ "$(git tag)" = "$(printf \'light\nv1\')" ]; git rev-parse -q --verify old; [ "$(git cat-file -t v1)" = tag ]',
      },
    ],
  },
  {
    name: "69 staged, added without content and made executable there: the index follows",
    setup: "echo a >a; echo m >m",
    steps: [
      {
        command: "echo n >n; git add n; echo i >i; git add -N i; chmod +x m; git update-index --chmod=+x m",
        here: { m: "*m\n" },
        proof: `[ "$(git status --porcelain)" = "$(printf ' A i\nM  m\nA  n')" ]`,
      },
    ],
  },
  {
    name: "70 switched to another branch there: follows",
    setup: "echo a >a",
    steps: [
      {
        command: "git checkout -q -b other; echo b >>a; git commit -qam there",
        proof: `[ "$(git symbolic-ref HEAD)" = refs/heads/other ]; ${subject("there")}; ${subject("first", "main")}; ${clean}`,
      },
    ],
  },
  {
    name: "70b switched there, and here to another: ours stays",
    setup: "echo a >a",
    steps: [
      {
        command: "git checkout -q -b theirs; git commit -q --allow-empty -m there",
        meanwhile: "git checkout -q -b ours",
        code: 254,
        says: [/HEAD was switched to refs\/heads\/theirs there/],
        proof: `[ "$(git symbolic-ref HEAD)" = refs/heads/ours ]; ${subject("first")}; ${subject("there", "theirs")}`,
      },
    ],
  },
  {
    name: "71 a detached HEAD",
    setup: "echo a >a",
    steps: [
      {
        before: "git checkout -q --detach",
        command: "echo b >>a; git commit -qam there",
        proof: `${subject("there")}; ! git symbolic-ref -q HEAD; ${subject("first", "main")}; ${clean}`,
      },
    ],
  },
  {
    name: "71b no commit yet: the first one is made there",
    steps: [
      {
        before: "echo a >a",
        command: "git add a; git commit -qm there",
        proof: `${subject("there")}; ${clean}`,
      },
    ],
  },
  {
    name: "72 a split index, packed refs, a repository with SHA-256",
    setup:
      "rm -rf .git; git init -q --object-format=sha256; echo a >a; git add a; git commit -qm zero; git update-index --split-index; git tag t; git pack-refs --all",
    steps: [{ command: "echo b >>a; git commit -qam there", proof: `${subject("there")}; ${clean}` }],
  },
  {
    name: "78 a commit whose tree has a .git entry is refused, and no ref moves",
    setup: "echo a >a",
    steps: [
      {
        command: `b=$(echo evil | git hash-object -w --stdin); t=$(printf '100755 blob %s\tpost-checkout\n' $b | git mktree); t=$(printf '040000 tree %s\thooks\n' $t | git mktree)
          raw=$(printf '40000 .git\\0'; printf %s $t | sed 's/../\\\\x&/g'); bash -c "printf '40000 .git\\\\0'; printf '$(printf %s $t | sed 's/../\\\\x&/g')'" >raw; t=$(git hash-object -t tree -w --literally raw); rm raw
          c=$(git commit-tree -p HEAD -m evil $t); git update-ref refs/heads/main $c; git cat-file -p $t | grep -q '[.]git'`,
        code: 254,
        says: [/hasDotgit|\.git|fsck/i],
        proof: `${subject("first")}; ! git rev-parse -q --verify refs/edict/h/heads/main; ${clean}`,
      },
    ],
  },
]

/** What must be the same with every shell and every set of tools over there. */
const portable = [...upload, ...bringingBack, ...localWork, ...crashes].filter(({ name }) =>
  /^(5|7|12|15|16|18|23|32|33|35|36|43|46|49|52|56|60) /.test(name),
)

/** At most this many cases at the same time: there are two cores. */
function limited(most: number): <T>(work: () => Promise<T>) => Promise<T> {
  let running = 0
  const waiting: (() => void)[] = []
  return async (work) => {
    if (running >= most) await new Promise<void>((resolve) => waiting.push(resolve))
    running++
    try {
      return await work()
    } finally {
      running--
      waiting.shift()?.()
    }
  }
}

const only = process.env.SYNC_CASE
function runAll(cases: readonly Case[], lab: () => Lab): void {
  const slot = limited(4)
  for (const item of cases)
    if (!only || item.name.startsWith(only))
      test.concurrent(item.name, async () => await slot(() => runCase(lab(), item)))
}

describe("a usual host", () => {
  let lab: Lab
  beforeAll(async () => void (lab = await startLab()))
  afterAll(async () => await lab?.[Symbol.asyncDispose]())
  runAll([...upload, ...bringingBack, ...localWork, ...crashes, ...commits], () => lab)
})

// ── Cases that need more than a script ───

async function make(lab: Lab, name: string, setup: string) {
  const cwd = `/root/${name}`
  const script = `mkdir ${cwd}; cd ${cwd}; git init -q; ${setup}\ngit add -A; git commit -qm first --allow-empty`
  expect(await lab.client.run(["/bin/sh", "-ec", script])).toMatchObject({ code: 0, stderr: "" })
  return { cwd, here: lab.client.outside(cwd), there: () => lab.remote(cwd) }
}

/** Starts a run whose command, after its work, waits until `go` is called. */
async function start(lab: Lab, cwd: string, command: string, host = "h") {
  const machine = lab.hosts.find(({ name }) => name === host)!
  const mark = `/tmp/wait-${Bun.nanoseconds()}`
  const script = `${command}\ntouch ${mark}.at; until [ -e ${mark}.go ]; do sleep 0.02; done`
  const running = lab.client.spawn(lab.argv(script, { host }), { cwd })
  running.end()
  await Promise.race([
    appears(machine.outside(`${mark}.at`)),
    running.result.then(({ stderr }) => expect(stderr).toBe("")),
  ])
  return { running, go: () => fs.writeFileSync(machine.outside(`${mark}.go`), "") }
}

function editorTest(labOf: () => Lab): void {
  test("50 an editor that saves in a loop while changes are applied loses nothing", async () => {
    const lab = labOf()
    const { cwd, here } = await make(lab, "editor", many(300, "echo base >f$i"))
    let saves = 0
    let conflicts = 0
    for (let round = 0; round < 3; round++) {
      const { running, go } = await start(lab, cwd, `for f in f*; do echo there-${round} >$f; done`)
      const last = new Map<string, string>()
      let ended = false
      void running.result.then(() => (ended = true))
      go()
      while (!ended) {
        for (let burst = 0; burst < 20; burst++) {
          const name = `f${1 + Math.floor(Math.random() * 300)}`
          const text = `here-${++saves}\n`
          fs.writeFileSync(join(here, ".saving"), text)
          fs.renameSync(join(here, ".saving"), join(here, name))
          last.set(name, text)
        }
        await Bun.sleep(0)
      }
      const lost = [...last].filter(([name, text]) => fs.readFileSync(join(here, name), "utf8") !== text)
      expect(lost).toEqual([])
      const { code, stderr } = await running.result
      expect(stderr).not.toContain("bug")
      expect([0, 254]).toContain(code)
      conflicts += Object.keys(conflictsOf(here)).length
      fs.rmSync(join(here, ".git/edict/conflicts"), { recursive: true, force: true })
      expectNothingLeft(here)
      expect(await lab.edict(cwd, ":")).toMatchObject({ code: 0 })
    }
    console.log(`${saves} saves, ${conflicts} conflicts`)
    expect(conflicts).toBeGreaterThan(0)
  })
}

describe("what needs more than a script", () => {
  let lab: Lab
  beforeAll(async () => void (lab = await startLab([{}, { nix: "2.8" }])))
  afterAll(async () => await lab?.[Symbol.asyncDispose]())
  test("24 a file that changes while it is sent: the next run sends it again", async () => {
    const { cwd, here } = await make(lab, "changing", many(300, "echo $i >f$i"))
    const stop = Promise.withResolvers<void>()
    let done = false
    void stop.promise.then(() => (done = true))
    const writer = (async () => {
      for (let version = 0; !done; version++) {
        for (let at = 1; at <= 300; at += 7) fs.writeFileSync(join(here, `f${at}`), `${version}\n`)
        await Bun.sleep(0)
      }
    })()
    const first = await lab.edict(cwd, ":")
    stop.resolve()
    await writer
    expect(first).toMatchObject({ code: 0 })
    expect(await lab.edict(cwd, ":")).toMatchObject({ code: 0, stderr: "" })
    await expectEqual(lab, cwd, lab.remote(cwd), false)
  })

  test("25 scattered ignored files cost little", async () => {
    const files = `for d in $(seq 40); do mkdir d$d; for f in $(seq 100); do echo $f >d$d/f$f; done; done; echo '*.o' >.gitignore`
    const plain = await make(lab, "few", files)
    const ignored = await make(
      lab,
      "scattered",
      `${files}; for d in $(seq 40); do for f in $(seq 25); do echo x >d$d/x$f.o; done; done`,
    )
    const fastest = async (cwd: string) => {
      const times: number[] = []
      for (let at = 0; at < 4; at++) {
        const began = performance.now()
        expect(await lab.edict(cwd, ":")).toMatchObject({ code: 0 })
        if (at > 0) times.push(performance.now() - began)
      }
      return Math.min(...times)
    }
    const [few, scattered] = [await fastest(plain.cwd), await fastest(ignored.cwd)]
    console.log(
      `unchanged tree of 4,000 files: ${few.toFixed(0)} ms; with 1,000 ignored ones: ${scattered.toFixed(0)} ms`,
    )
    expect(scattered).toBeLessThan(2 * few + 200)
  })

  test("26 a large ignored directory over there is looked at once", async () => {
    const { cwd, here } = await make(lab, "large", "echo big/ >.gitignore; echo a >a")
    expect(await lab.edict(cwd, "mkdir big; cd big; seq 20000 | xargs touch")).toMatchObject({
      code: 0,
      stderr: "",
    })
    expect(await lab.edict(cwd, "echo b >>a")).toMatchObject({ code: 0 })
    const meta = join(lab.remote("/root"), "../../meta")
    const listing = fs
      .readdirSync(meta)
      .map((id) => join(meta, id))
      .find((id) => fs.readFileSync(join(id, "path"), "utf8").includes(cwd))!
    expect(fs.readFileSync(join(listing, "base"), "latin1")).not.toContain("./big/")
    expect(await lab.edict(cwd, "[ -e big/20000 ]")).toMatchObject({ code: 0, stderr: "" })
    expect(fs.existsSync(join(here, "big"))).toBe(false)
  })

  test("39 a large file comes home as a stream: edict's own memory stays small", async () => {
    const { cwd, here } = await make(lab, "stream", "echo a >a")
    const running = lab.client.spawn(lab.argv("head -c 400000000 /dev/zero >big"), { cwd })
    running.end()
    let most = 0
    let ended = false
    void running.result.then(() => (ended = true))
    const pid = await running.pid()
    while (!ended) {
      const status = await Bun.file(`/proc/${pid}/status`)
        .text()
        .catch(() => "")
      most = Math.max(most, Number(/VmHWM:\s*(\d+)/.exec(status)?.[1] ?? 0))
      await Bun.sleep(20)
    }
    expect(await running.result).toMatchObject({ code: 0 })
    expect(fs.statSync(join(here, "big")).size).toBe(400_000_000)
    expect(most).toBeGreaterThan(10_000)
    expect(most).toBeLessThan(300_000) // KiB
  })

  editorTest(() => lab)

  test("51 an editor that holds a file open and writes into it after it was replaced: said, and saved", async () => {
    const count = 400
    const { cwd, here } = await make(lab, "in-place", many(count, "printf '%08d' $i >$(printf f%03d $i)"))
    const names = Array.from({ length: count }, (_, at) => `f${String(at + 1).padStart(3, "0")}`)
    const { running, go } = await start(lab, cwd, "for f in f*; do echo there >$f; done")
    const open = new Map(names.map((name) => [name, fs.openSync(join(here, name), "r+")]))
    let ended = false
    void running.result.then(() => (ended = true))
    go()
    const written = new Map<string, string>()
    const isReplaced = (name: string) =>
      fs.statSync(join(here, name), { throwIfNoEntry: false })?.ino !== fs.fstatSync(open.get(name)!).ino
    while (!ended) {
      for (const name of names) {
        if (written.has(name) || !isReplaced(name)) continue
        fs.writeSync(open.get(name)!, `mine-${name}`, 0)
        // Once the last one is replaced the old files may have been looked at already.
        if (
          names.filter((other) => !written.has(other) && other !== name).some((other) => !isReplaced(other))
        )
          written.set(name, `mine-${name}`)
      }
      await Bun.sleep(0)
    }
    const { code, stderr } = await running.result
    const saved = [...written].filter(
      ([name, text]) =>
        fs.readFileSync(join(here, name), "utf8") === text || Object.values(conflictsOf(here)).includes(text),
    )
    expect(saved.length).toBe(written.size)
    console.log(`${written.size} files written after they were replaced`)
    if (written.size > 0) {
      expect(code).toBe(254)
      expect(stderr).toMatch(/was written here while it was replaced/)
    }
  })

  /** What must be true of a tree whose run was killed: each file is old or new, and the next run repairs all. */
  const expectWhole = async (cwd: string, allowed: (name: string) => string[]) => {
    const here = lab.client.outside(cwd)
    const odd = [...snapshot(here)].filter(
      ([name, text]) => !name.includes(".edict-stage") && !allowed(name).includes(text),
    )
    expect(odd).toEqual([])
    expect(fs.existsSync(join(here, ".git/index.lock"))).toBe(false)
  }

  const kills: [
    string,
    (running: { kill: (signal: NodeJS.Signals) => Promise<void> }) => Promise<unknown>,
    number,
  ][] = [
    ["edict is killed", async (running) => await running.kill("SIGKILL"), 14],
    ["ssh is killed", async () => await lab.client.sh("pkill -KILL -x ssh"), 8],
    ["the remote sshd is killed", async () => await lab.host.dropConnections(), 8],
  ]
  for (const [what, kill, times] of kills)
    test(`53-55 ${what}, at any moment`, async () => {
      const name = what.replaceAll(" ", "-")
      const { cwd, here } = await make(lab, name, `${many(40, "echo old >f$i")}; echo mine >mine`)
      expect(await lab.edict(cwd, ":")).toMatchObject({ code: 0 })
      let version = 0
      for (let at = 0; at < times; at++) {
        const [before, after] = [`v${version}\n`, `v${version + 1}\n`]
        for (let file = 1; file <= 40; file++) fs.writeFileSync(join(here, `f${file}`), before)
        fs.writeFileSync(join(here, "mine"), before)
        const running = lab.client.spawn(
          lab.argv(`for f in f*; do echo v${version + 1} >$f; done; echo ${version + 1} >new${at}`),
          { cwd },
        )
        running.end()
        await Bun.sleep((at * 700) / times)
        await kill(running).catch(() => undefined)
        const { stderr } = await running.result
        expect(stderr).not.toContain("this is a bug")
        await expectWhole(cwd, (file) =>
          file.startsWith("new")
            ? Array.from({ length: at + 1 }, (_, n) => [`${n}\n`, `${version + 1}\n`])
                .flat()
                .concat(Array.from({ length: version + 2 }, (_, n) => `${n}\n`))
            : [before, after],
        )
        expect(fs.readFileSync(join(here, "mine"), "utf8")).toBe(before)
        // An edit after the crash must survive the repair.
        fs.writeFileSync(join(here, "f1"), "edited\n")
        const repair = await lab.edict(cwd, ":")
        expect(repair.stderr).not.toContain("this is a bug")
        expect([0, 254]).toContain(repair.code)
        expect(fs.readFileSync(join(here, "f1"), "utf8")).toBe("edited\n")
        expectNothingLeft(here)
        expect(await lab.edict(cwd, ":")).toMatchObject({ code: 0, stderr: "" })
        await expectEqual(lab, cwd, lab.remote(cwd), false)
        version += 2
      }
    })

  test("55b the connection is lost while the command works: what it did comes home with the next run", async () => {
    const { cwd, here } = await make(lab, "lost", "echo a >a")
    const { running } = await start(lab, cwd, "echo late >late; echo b >>a")
    await lab.host.dropConnections()
    const { code, stderr } = await running.result
    expect({ code, lost: /lost|ended|closed/.test(stderr) }).toEqual({ code: 255, lost: true })
    expect(fs.existsSync(join(here, "late"))).toBe(false)
    const next = await lab.edict(cwd, "cat late")
    expect(next).toMatchObject({ code: 0, stdout: "late\n" })
    expect(next.stderr).toContain("an earlier run on h was cut off; first its changes come home")
    expect([fs.readFileSync(join(here, "late"), "utf8"), fs.readFileSync(join(here, "a"), "utf8")]).toEqual([
      "late\n",
      "a\nb\n",
    ])
  })

  test("60c mass deletion on a terminal: asks", async () => {
    for (const [answer, left, code] of [
      ["n", 40, 254],
      ["y", 0, 0],
    ] as const) {
      const { cwd, here } = await make(lab, `asks-${answer}`, many(40, "echo $i >f$i"))
      const running = lab.client.spawn(lab.argv("rm f*"), { cwd, tty: true })
      await running.waitFor("Delete them here, too? [y/N]")
      running.write(`${answer}\n`)
      expect((await running.result).code).toBe(code)
      expect(fs.readdirSync(here).filter((name) => name.startsWith("f")).length).toBe(left)
    }
  })

  test("87 two runs from one directory to one host: both finish, each sees its own tree, both results come home", async () => {
    const { cwd, here } = await make(lab, "twice", "echo a >a; echo b >b")
    const first = await start(lab, cwd, "echo first >>a; echo 1 >one")
    const second = await start(lab, cwd, "grep -q first a && exit 9; echo second >>b; echo 2 >two")
    first.go()
    second.go()
    const results = await Promise.all([first.running.result, second.running.result])
    expect(results.map(({ code, stderr }) => ({ code, conflict: stderr.includes("conflict") }))).toEqual([
      { code: 0, conflict: false },
      { code: 0, conflict: false },
    ])
    expect(Object.fromEntries(snapshot(here))).toEqual({
      a: "a\nfirst\n",
      b: "b\nsecond\n",
      one: "1\n",
      two: "2\n",
    })
    expect(await lab.edict(cwd, "cat a b one two")).toMatchObject({
      code: 0,
      stdout: "a\nfirst\nb\nsecond\n1\n2\n",
    })
  })

  test("88 two runs that edit one file: the first is applied, the second is a conflict", async () => {
    const { cwd, here } = await make(lab, "both-edit", "echo a >a")
    const first = await start(lab, cwd, "echo first >>a")
    const second = await start(lab, cwd, "echo second >>a")
    first.go()
    expect(await first.running.result).toMatchObject({ code: 0 })
    second.go()
    expect(await second.running.result).toMatchObject({ code: 254 })
    expect(fs.readFileSync(join(here, "a"), "utf8")).toBe("a\nfirst\n")
    expect(conflictsOf(here)).toEqual({ a: "a\nsecond\n" })
  })

  test("89 runs on two hosts at once: as on one", async () => {
    const { cwd, here } = await make(lab, "two-hosts", "echo a >a; echo b >b")
    const first = await start(lab, cwd, "echo first >>a; echo 1 >one")
    const second = await start(lab, cwd, "echo second >>b; echo 2 >two; echo other >one", "h1")
    first.go()
    expect(await first.running.result).toMatchObject({ code: 0 })
    second.go()
    expect(await second.running.result).toMatchObject({ code: 254 })
    expect(Object.fromEntries(snapshot(here))).toEqual({
      a: "a\nfirst\n",
      b: "b\nsecond\n",
      one: "1\n",
      two: "2\n",
    })
    expect(conflictsOf(here)).toEqual({ one: "other\n" })
  })
})

// ── Other hosts ───

test("58 the disk over there is full: nothing is applied, and it is said", async () => {
  await using lab = await startLab([{ diskLimit: "20m" }])
  const cwd = "/root/full"
  await lab.client.sh(
    `mkdir ${cwd} && cd ${cwd} && git init -q && echo a >a && git add a && git commit -qm first`,
  )
  expect(await lab.edict(cwd, ":")).toMatchObject({ code: 0 })
  await lab.client.sh("head -c 30000000 /dev/urandom >big; echo b >>a", { cwd })
  const failed = await lab.edict(cwd, "echo ran")
  expect(failed).toMatchObject({ code: 254, stdout: "" })
  expect(failed.stderr).toMatch(/No space left/)
  expect(fs.readFileSync(join(lab.remote(cwd), "a"), "utf8")).toBe("a\n")
  await lab.client.sh("rm big", { cwd })
  expect(await lab.edict(cwd, "cat a")).toMatchObject({ code: 0, stdout: "a\nb\n" })
  await expectEqual(lab, cwd, lab.remote(cwd), false)
  // And when the command itself fills it: what it could write comes home.
  const filled = await lab.edict(
    cwd,
    "echo c >>a; head -c 30000000 /dev/zero >/root/fill; rm /root/fill; exit 3",
  )
  expect(filled).toMatchObject({ code: 3 })
  expect(fs.readFileSync(lab.client.outside(`${cwd}/a`), "utf8")).toBe("a\nb\nc\n")
})

describe("83 one tool missing over there: it is named, and nothing is taken for unchanged", () => {
  test.concurrent.each(["awk", "tr", "tar", "find"])("%s", async (tool) => {
    const hide = tool === "awk" ? ["awk", "mawk", "gawk", "original-awk"] : [tool]
    await using lab = await startLab([{ hide }], undefined, "without a first run")
    const cwd = "/root/p"
    await lab.client.sh(
      `mkdir ${cwd} && cd ${cwd} && git init -q && echo a >a && git add a && git commit -qm first`,
    )
    const result = await lab.edict(cwd, "echo b >>a; echo ran")
    expect(result).toMatchObject({ code: 254, stdout: "" })
    expect(result.stderr).toContain(tool)
    expect(fs.readFileSync(lab.client.outside(`${cwd}/a`), "utf8")).toBe("a\n")
  })
})

const withoutExchange = ["bun", join(import.meta.dir, "no-exchange.ts"), EDICT]
const variants: [name: string, host: Partial<HostOptions>, program?: string[]][] = [
  ["82 busybox, and a login shell that talks", { busybox: true }],
  ["86 fish, and a configuration that talks", { shell: "fish" }],
  ["a file system here that cannot exchange two names", {}, withoutExchange],
]
for (const [name, host, program] of variants)
  describe(name, () => {
    let lab: Lab
    beforeAll(async () => {
      lab = await startLab([host], program)
      await lab.host.sh(
        "mkdir -p .config/fish; echo 'echo noise; echo noise >&2' | tee .bashrc .profile .config/fish/config.fish .zshenv",
      )
    })
    afterAll(async () => await lab?.[Symbol.asyncDispose]())
    runAll(portable, () => lab)
    if (program) {
      test("the filter works", async () => {
        const attempt = `const { dlopen } = require("bun:ffi"); const c = (text) => Buffer.from(text + "\\0")
          const { symbols } = dlopen("libc.so.6", { renameat2: { args: ["i32", "cstring", "i32", "cstring", "u32"], returns: "i32" } })
          console.log([2, 0].map((flags) => symbols.renameat2(-100, c("/tmp/x"), -100, c("/tmp/y"), flags)).join(" "))`
        await lab.client.sh("touch /tmp/x /tmp/y")
        const { stdout } = await lab.client.run([...program.slice(0, -1), "/run/lab/bin/bun", "-e", attempt])
        expect(stdout).toBe("-1 0\n")
      })
      editorTest(() => lab)
    }
  })

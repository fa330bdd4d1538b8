/**
 * Same derivation: for every shape of checkout the evaluation over there gives what the evaluation here gives,
 * and git works there. One table of shapes, run with each Nix that can be had.
 */

import { afterAll, beforeAll, describe, expect, test } from "bun:test"
import { writeFileSync } from "node:fs"
import { SYSTEM } from "./lab/flake"
import {
  nixAvailable,
  shellWords,
  startClient,
  startHost,
  type Client,
  type Host,
  type NixVersion,
  type Result,
} from "./lab/lab"
import { EDICT } from "./support"

/**
 * One shape of checkout. Its set-up starts in an empty directory with what SETUP_FUNCTIONS offers; `words`, shell
 * text behind `nix`, run where that ended, or in the subdirectory `p` if that is where it started.
 */
type Shape = {
  name: string
  setup: string
  /** Default: EVALUATION. */
  words?: string
  /** What happens after a first run; then the same words run once more. */
  change?: string
  /** Versions that cannot read this even here, before its change, and why: there they must fail as well. */
  unreadable?: Partial<Record<NixVersion, string>>
  /** The copy over there is in a better state: what `unreadable` says is true of this side only. */
  mendedThere?: true
}

/** All that a flake can see of itself and its inputs, and the .drv of a package that depends on it. */
const EVALUATION = "eval --json .#all"

const FLAKE = `{
  inputs = { };
  outputs = { self, ... }@inputs:
    let
      info = flake: removeAttrs flake.sourceInfo [ "outPath" ];
      package = text: derivation {
        name = "package";
        system = "${SYSTEM}";
        builder = "/bin/sh";
        args = [ "-c" "printf %s \\"$text\\" >\\"$out\\"" ];
        inherit text;
      };
      all = {
        source = self.outPath;
        self = info self;
        inputs = builtins.mapAttrs (_: info) (removeAttrs inputs [ "self" ]);
        value = inputs.dep.value or null;
      };
    in
    {
      all = all // { drv = (package (builtins.toJSON all)).drvPath; };
      source = (package self.outPath).drvPath;
      packages.${SYSTEM} = {
        default = package (builtins.toJSON all);
        sh = derivation {
          name = "sh";
          system = "${SYSTEM}";
          builder = "/bin/sh";
          PATH = "/bin:/usr/bin";
          args = [ "-c" "mkdir -p $out/bin && printf '#!/bin/sh\\nexec /bin/sh -c \\"$1\\"\\n' >$out/bin/sh && chmod +x $out/bin/sh" ];
        };
      };
    };
}
`

const SETUP_FUNCTIONS = `
set -eu
# a flake in a directory; its own name in it, so that no two shapes share a commit
flake() { mkdir -p "$1"; cp /root/flake.nix "$1/flake.nix"; echo "$here" >"$1/name.txt"; }
# the current directory's flake gets the input dep
input() { sed -i "s|inputs = { };|inputs.dep.url = \\"$1\\";|" flake.nix; }
# a flake that can be an input
dependency() { mkdir -p "$1"; echo "{ outputs = _: { value = \\"$here\\"; }; }" >"$1/flake.nix"; }
files() { echo one >a.txt; mkdir -p sub/deep; echo two >sub/deep/b.txt; echo '#!/bin/sh' >run.sh; chmod +x run.sh; ln -s a.txt link; }
save() { git add -A && git commit -q --allow-empty -m "\${1-more}"; }
# a committed flake in p
repo() { flake p; cd p; git init -q; files; echo '/ignored*' >.gitignore; save first; }
# nothing here was written in the second of its commit
old() { git ls-files -z | xargs -0 touch -h -d '1 hour ago'; git update-index -q --refresh; }
# with a submodule in module
submodule() {
  mkdir m && (cd m && git init -q && echo m >m.txt && save module)
  repo; git -c protocol.file.allow=always submodule --quiet add "$here/m" module; save submodule
}
`

const SUBMODULES_FROM_UPSTREAM = "clones submodules of a clean tree from their upstream, even here"
const NO_SPLIT_INDEX = "knows no split index"
const NO_STRANGE_PLACE = "reads no URL of a place with such a name"
const NO_LINK_ITSELF = "takes no link for a directory"
const NO_SHA256 = "knows no SHA-256 commits"

const SHAPES: Shape[] = [
  // ── What the index and the working tree say ───
  { name: "clean", setup: "repo" },
  { name: "dirty", setup: "repo; echo two >a.txt" },
  { name: "untracked", setup: "repo; echo new >new.txt; mkdir d; echo new >d/new.txt" },
  { name: "staged", setup: "repo; echo new >new.txt; echo two >a.txt; git add -A" },
  { name: "staged, then edited", setup: "repo; echo new >new.txt; git add -A; echo newer >new.txt" },
  { name: "staged, then reverted", setup: "repo; echo two >a.txt; git add -A; echo one >a.txt" },
  { name: "staged, then deleted", setup: "repo; echo new >new.txt; git add -A; rm new.txt" },
  { name: "intent to add", setup: "repo; echo new >new.txt; git add -N new.txt" },
  { name: "deleted", setup: "repo; rm a.txt; rm -r sub" },
  { name: "deletion staged", setup: "repo; git rm -q a.txt" },
  { name: "no longer tracked", setup: "repo; git rm -q --cached a.txt" },
  { name: "renamed", setup: "repo; mv sub other" },
  { name: "rename staged", setup: "repo; git mv a.txt z.txt" },
  { name: "made executable", setup: "repo; chmod +x a.txt" },
  { name: "no longer executable, staged", setup: "repo; chmod -x run.sh; git add -A" },
  {
    name: "a mode that git is told to ignore",
    setup: "repo; git config core.fileMode false; chmod +x a.txt",
  },
  { name: "a link for a file", setup: "repo; rm a.txt; ln -s sub/deep/b.txt a.txt" },
  { name: "a file for a directory", setup: "repo; rm -r sub; echo file >sub" },
  { name: "touched", setup: "repo; touch a.txt" },
  { name: "tracked although ignored", setup: "repo; echo x >ignored; git add -f ignored; git commit -qm x" },
  { name: "ignored", setup: "repo; echo x >ignored; mkdir ignored.d; echo x >ignored.d/x" },
  { name: "empty directories", setup: "repo; mkdir -p empty/er" },
  {
    name: "in the middle of a merge conflict",
    setup: `repo; git switch -qc other; echo other >a.txt; save other; git switch -q main; echo main >a.txt; save main
      git merge -q other || true`,
  },
  {
    name: "assume-unchanged",
    setup: "repo; old; git update-index --assume-unchanged a.txt; echo two >a.txt",
  },
  { name: "skip-worktree", setup: "repo; old; git update-index --skip-worktree a.txt; echo two >a.txt" },
  { name: "skip-worktree, not there", setup: "repo; git update-index --skip-worktree a.txt; rm a.txt" },
  {
    name: "split index",
    setup: "repo; git update-index --split-index; echo two >a.txt; git add a.txt",
    change: "git update-index --no-split-index",
    unreadable: { "2.26": NO_SPLIT_INDEX, "2.34": NO_SPLIT_INDEX },
    mendedThere: true,
  },
  {
    name: "untracked cache",
    setup: "repo; git update-index --untracked-cache; echo new >new.txt; git status -s",
  },
  { name: "index of version 4", setup: "repo; git update-index --index-version 4; echo two >a.txt" },

  // ── What HEAD and its history say ───
  { name: "second commit", setup: "repo", change: "echo two >a.txt; save second" },
  {
    name: "amended commit",
    setup: "repo; save x",
    change: "echo two >a.txt; git commit -qa --amend -m amended",
  },
  {
    name: "commit undone",
    setup: "repo; echo two >a.txt; save second",
    change: "git reset -q --hard HEAD~1",
  },
  {
    name: "other branch",
    setup: "repo; git switch -qc other; echo two >a.txt; save second; git switch -q main",
    change: "git switch -q other",
  },
  {
    name: "unrelated branch",
    setup: "repo",
    change: "git switch -q --orphan other; flake .; files; save other",
  },
  {
    name: "merged branch",
    setup: "repo",
    change: "git switch -qc o; echo o >o; save o; git switch -q main; echo m >m; save m; git merge -q o",
  },
  {
    name: "history rewritten",
    setup: "repo; save x",
    change: "git checkout -q --orphan new; git commit -qm new; git branch -D main -q",
  },
  { name: "no commit yet", setup: "flake p; cd p; git init -q; files; git add -A" },
  { name: "no commit yet, edited", setup: "flake p; cd p; git init -q; files; git add -A; echo two >a.txt" },
  {
    name: "the first commit",
    setup: "flake p; cd p; git init -q; files; git add -A",
    change: "git commit -qm first",
  },
  { name: "detached HEAD", setup: "repo; echo two >a.txt; save second; git checkout -q --detach HEAD~1" },
  { name: "annotated tags", setup: "repo; git tag -am one v1; echo two >a.txt; save second; git tag light" },
  {
    name: "a tag elsewhere",
    setup: "repo; git switch -qc o; echo o >o; save o; git tag -am o o1; git switch -q main",
  },
  {
    name: "shallow clone",
    setup:
      "repo; echo two >a.txt; save second; save third; cd ..; mv p o; git clone -q --depth 2 file://$here/o p",
  },
  {
    name: "shallow clone, deepened",
    setup: "repo; echo two >a.txt; save second; cd ..; mv p o; git clone -q --depth 1 file://$here/o p",
    change: "git fetch -q --unshallow",
  },
  {
    name: "alternates",
    setup: "repo; cd ..; mv p o; git clone -q --shared o p; cd p; echo two >a.txt; save second",
  },
  { name: "packed", setup: "repo; echo two >a.txt; save second; git gc -q; git pack-refs --all" },
  {
    name: "worktree",
    setup: "repo; echo two >a.txt; save second; cd ..; mv p o; git -C o worktree add -q ../p -b w HEAD~1",
  },
  {
    name: "dirty worktree",
    setup: "repo; cd ..; mv p o; git -C o worktree add -q ../p -b w; cd p; echo two >a.txt; git add a.txt",
  },
  { name: "git directory elsewhere", setup: "repo; git init -q --separate-git-dir ../elsewhere" },
  {
    name: "SHA-256, clean",
    setup: "flake p; cd p; git init -q --object-format=sha256; files; save first",
    unreadable: { "2.8": NO_SHA256, "2.26": NO_SHA256, "2.34": NO_SHA256 },
  },
  {
    name: "SHA-256, dirty",
    setup:
      "flake p; cd p; git init -q --object-format=sha256; files; save first; git tag -am x x; echo two >a.txt",
    unreadable: { "2.26": NO_SHA256, "2.34": NO_SHA256 },
  },

  // ── Quick changes ───
  { name: "edit of the same size at once", setup: "repo", change: "echo two >a.txt" },
  {
    name: "edit of the same size and time",
    setup: "repo; echo two >a.txt",
    change: "touch -r a.txt ../t; echo six >a.txt; touch -r ../t a.txt",
  },
  { name: "edit taken back", setup: "repo; echo two >a.txt", change: "echo one >a.txt" },
  { name: "touched later", setup: "repo; old", change: "touch a.txt" },
  { name: "added later", setup: "repo; echo new >new.txt", change: "git add -N new.txt" },
  { name: "renamed later", setup: "repo", change: "git mv sub other; echo x >sub" },
  { name: "deleted later", setup: "repo", change: "rm -r sub" },

  // ── Submodules ───
  { name: "submodule", setup: "submodule" },
  { name: "submodule, edited", setup: "submodule; echo two >module/m.txt" },
  {
    name: "submodule, with a commit of its own",
    setup: "submodule; cd module; echo two >m.txt; save two; cd ..",
  },
  { name: "submodule, never checked out", setup: "submodule; git submodule --quiet deinit -f module" },
  {
    name: "submodule, asked for",
    setup: "submodule",
    words: "eval --json '.?submodules=1#all'",
    unreadable: { "2.8": SUBMODULES_FROM_UPSTREAM },
  },
  {
    name: "submodule, asked for, tree dirty",
    setup: "submodule; echo two >a.txt",
    words: "eval --json '.?submodules=1#all'",
  },
  {
    name: "submodule, asked for, edited",
    setup: "submodule; echo two >module/m.txt",
    words: "eval --json '.?submodules=1#all'",
  },
  {
    name: "submodule in a submodule, tree dirty",
    setup: `mkdir n && (cd n && git init -q && echo n >n.txt && save n)
      mkdir m && (cd m && git init -q && git -c protocol.file.allow=always submodule --quiet add "$here/n" nested && save m)
      repo; git -c protocol.file.allow=always submodule --quiet add "$here/m" 'a module'; save submodule
      git -c protocol.file.allow=always submodule --quiet update --init --recursive; echo two >a.txt`,
    words: "eval --json '.?submodules=1#all'",
  },
  {
    name: "repository in the repository",
    setup: "repo; mkdir r; cd r; git init -q; echo r >r.txt; save r; cd ..",
  },
  {
    name: "submodule without an entry",
    setup: "repo; mkdir r; cd r; git init -q; echo r >r.txt; save r; cd ..; git add r 2>&1; git commit -qm r",
  },

  // ── Which flake, which commit ───
  {
    name: "flake in a subdirectory",
    setup: "repo; flake d; save d; echo two >d/a.txt; git add -N d/a.txt",
    words: "eval --json ./d#all",
  },
  { name: "from inside a subdirectory", setup: "repo; cd sub/deep", words: "eval --json '.#all'" },
  { name: "?dir=", setup: "repo; flake d; save d", words: "eval --json '.?dir=d#all'" },
  {
    name: "git+file: and dir=",
    setup: "repo; flake d; save d",
    words: `eval --json "git+file://$PWD?dir=d#all"`,
  },
  {
    name: "?ref=",
    setup: "repo; git switch -qc o; echo o >o; save o; git switch -q main; echo m >a.txt",
    words: "eval --json '.?ref=o#all'",
  },
  { name: "?ref= of this branch", setup: "repo; echo two >a.txt", words: "eval --json '.?ref=main#all'" },
  {
    name: "?ref= of a tag",
    setup: "repo; git tag v1; echo two >a.txt; save second",
    words: "eval --json '.?ref=refs/tags/v1#all'",
  },
  {
    name: "?ref= of another remote",
    setup:
      "repo; cd ..; mv p o; git clone -q o p; cd o; git switch -qc b; echo b >b; save b; cd ../p; git fetch -q",
    words: "eval --json '.?ref=refs/remotes/origin/b#all'",
  },
  {
    name: "?ref= after a run without",
    setup: "repo; git switch -qc o; echo o >o; save o; git switch -q main; edict h nix eval .#source >&2",
    words: "eval --json '.?ref=o#all'",
    change: "git switch -q o; echo p >o; save p; git switch -q main",
  },
  {
    name: "?rev= of an older commit",
    setup: "repo; echo two >a.txt; save second; save third",
    words: `eval --json ".?rev=$(git rev-parse HEAD~2)#all"`,
  },
  {
    name: "?rev= of another branch",
    setup: "repo; git switch -qc o; echo o >o; save o; git switch -q main",
    words: `eval --json ".?ref=o&rev=$(git rev-parse o)#all"`,
  },
  {
    name: "?rev= of a commit no branch has",
    setup: "repo; echo two >a.txt; save second; git reset -q --hard HEAD~1",
    words: `eval --json ".?rev=$(git rev-parse 'HEAD@{1}')#all"`,
  },
  {
    name: "?rev= with allRefs",
    setup: "repo; git switch -qc o; echo o >o; save o; git switch -q main",
    words: `eval --json "git+file:.?allRefs=1&rev=$(git rev-parse o)#all"`,
  },
  { name: "by absolute path", setup: "repo; echo two >a.txt", words: `eval --json "$PWD#all"` },
  {
    name: "from beside it",
    setup: "repo; echo two >a.txt; mkdir ../q; cd ../q",
    words: "eval --json ../p#all",
  },
  {
    name: "symlinked directory",
    setup: "repo; echo two >a.txt; cd ..; mv p real; ln -s real p",
    words: "eval --json ../p#all",
    unreadable: { "2.8": NO_LINK_ITSELF, "2.26": NO_LINK_ITSELF },
    mendedThere: true,
  },
  {
    name: "from within a symlinked directory",
    setup: "repo; echo two >a.txt; cd ..; mv p real; ln -s real p",
  },

  // ── Inputs ───
  {
    name: "input inside the tree",
    setup: "repo; dependency dep; input path:./dep; git add -A; nix flake lock; save dep",
  },
  {
    name: "input beside the flake",
    setup:
      "repo; flake top; dependency dep; cd top; input path:../dep; git add -A; nix flake lock; cd ..; save dep",
    words: "eval --json ./top#all",
  },
  {
    name: "input by absolute path, locked",
    setup: "dependency dep; repo; input path:$here/dep; git add -A; nix flake lock; save lock",
  },
  {
    name: "input by absolute path, a repository, locked",
    setup:
      "dependency dep; cd dep; git init -q; save dep; cd ..; repo; input path:$here/dep; git add -A; nix flake lock; save lock",
  },
  {
    name: "input by git+file:, locked",
    setup:
      "dependency dep; cd dep; git init -q; save dep; cd ..; repo; input git+file://$here/dep; git add -A; nix flake lock; save lock",
  },

  // ── No git ───
  { name: "directory", setup: "flake p; cd p; files" },
  {
    name: "directory with old files",
    setup: "flake p; cd p; files; find . -print0 | xargs -0 touch -h -d '2001-02-03 04:05:06'",
  },
  {
    name: "directory, a directory is its newest",
    setup:
      "flake p; cd p; files; find . -print0 | xargs -0 touch -h -d '2001-02-03'; touch -d '2011-02-03' sub",
  },
  {
    name: "directory, a link is its newest",
    setup:
      "flake p; cd p; files; find . -print0 | xargs -0 touch -h -d '2001-02-03'; touch -h -d '2012-02-03' link",
  },
  {
    name: "directory with empty directories and ignored files",
    setup: "flake p; cd p; mkdir -p empty/er; echo '*' >.gitignore; echo x >x; ln -s nowhere result",
  },
  {
    name: "directory, changed",
    setup: "flake p; cd p; files; mkdir empty",
    change: "rmdir empty; mv sub other; echo two >a.txt",
  },
  {
    name: "directory, touched",
    setup: "flake p; cd p; files; find . -print0 | xargs -0 touch -h -d '2001-02-03'",
    change: "touch -d '2013-02-03' a.txt",
  },
  {
    name: "directory, a directory touched later",
    setup: "flake p; cd p; files; find . -print0 | xargs -0 touch -h -d '2001-02-03'; sleep 2.1",
    change: "touch -d '2013-02-03' sub",
  },
  {
    name: "path: of a repository",
    setup: "repo; echo two >a.txt; echo x >ignored",
    words: "eval --json path:.#all",
  },
  {
    name: "path: by absolute path, older",
    setup: "repo; find . -print0 | xargs -0 touch -h -d '2001-02-03'",
    words: `eval --json "path:$PWD#all"`,
  },
  { name: "below somebody else's .git", setup: "git init -q; repo; cd ..; mv p/.git g; save outer" },
  {
    name: "below somebody else's .git, unknown to it",
    setup: "git init -q; flake p; cd p; files",
    unreadable: { "2.8": "not in git", "2.26": "not in git", "2.34": "not in git" },
  },

  // ── Names, modes, filters ───
  {
    name: "names",
    setup: `repo; mkdir -- 'a b' '-d'; echo 1 >'a b/c d'; echo 2 >"$(printf 'new\\nline')"; echo 3 >-r; echo 4 >./-d/-n
      echo 5 >'größe ☃'; echo 6 >'quo"te'; echo 7 >'back\\slash'; echo 8 >'st*r?[x]'; echo 9 >'$(touch x)'; echo t >"$(printf 'tab\\t')"
      ln -s 'a b' ' '; echo 0 >'%41'; echo e >'end '; echo d >...; git add -A; git commit -qm names; echo two >-r`,
    change: `rm -- -r "$(printf 'new\\nline')"; echo 55 >'größe ☃'`,
  },
  {
    name: "names that are no UTF-8",
    setup: `repo; echo 1 >"$(printf 'latin\\351')"; mkdir "$(printf 'd\\377')"; echo 2 >"$(printf 'd\\377/x')"; save names`,
  },
  {
    name: "directory names",
    setup: `flake "p"; cd p; mkdir 'a b'; echo 1 >'a b/%41'; echo 2 >"$(printf 'new\\nline')"; echo 3 >'größe'; echo 4 >-r`,
  },
  {
    name: "place with a strange name",
    setup: `repo; cd ..; mv p 'ä b'; ln -s 'ä b' p`,
    words: `eval --json "path:$(pwd -P | sed 's/ä/%C3%A4/; s/ /%20/')#all"`,
    unreadable: { "2.8": NO_STRANGE_PLACE },
    mendedThere: true,
  },
  {
    name: "repository in a place with a strange name",
    setup: `repo; cd ..; mkdir 'ä b'; mv p 'ä b/p'; ln -s 'ä b/p' p`,
    unreadable: { "2.8": NO_STRANGE_PLACE },
    mendedThere: true,
  },
  { name: "umask 077", setup: "umask 077; repo; echo two >a.txt; echo x >x; chmod 755 x; git add x" },
  {
    name: "odd modes",
    setup: "repo; chmod 654 a.txt; chmod 700 run.sh; chmod 2775 sub; chmod 400 .gitignore",
  },
  {
    name: "CRLF by autocrlf",
    setup:
      "git config --global --unset core.autocrlf || true; repo; git config core.autocrlf true; rm a.txt; git checkout -q a.txt; old",
  },
  {
    name: "CRLF by attributes",
    setup:
      "repo; echo '*.txt text eol=crlf' >.gitattributes; save attributes; rm a.txt; git checkout -q a.txt; old",
  },
  {
    name: "CRLF by attributes, edited",
    setup:
      "repo; echo '*.txt text eol=crlf' >.gitattributes; save attributes; rm a.txt; git checkout -q a.txt; old; printf 'x\\r\\n' >a.txt",
  },
  { name: "export-ignore", setup: "repo; echo 'a.txt export-ignore' >.gitattributes; save attributes" },
  {
    name: "attributes outside of the tree",
    setup: "repo; mkdir -p .git/info; echo 'a.txt export-ignore' >.git/info/attributes; old",
  },
  {
    name: "filter",
    setup: `repo; echo '*.big filter=big' >.gitattributes
      git config filter.big.clean 'tr a-z A-Z'; git config filter.big.smudge 'tr A-Z a-z'; git config filter.big.required true
      echo content >x.big; echo other >y.big; echo q >'"q.big'; save filter; old`,
  },
  {
    name: "filter, another file edited",
    setup: `repo; echo '*.big filter=big' >.gitattributes
      git config filter.big.clean 'tr a-z A-Z'; git config filter.big.smudge 'tr A-Z a-z'
      echo content >x.big; save filter; old; echo two >a.txt`,
    change: "echo one >a.txt; touch -d '1 hour ago' a.txt; git update-index --refresh",
  },
  {
    name: "filter, a filtered file edited",
    setup: `repo; echo '*.big filter=big' >.gitattributes
      git config filter.big.clean 'tr a-z A-Z'; git config filter.big.smudge 'tr A-Z a-z'
      echo content >x.big; echo other >y.big; echo far >z.big; save filter; old
      git update-index --skip-worktree z.big; rm z.big; echo edited >x.big`,
  },
]

/** Shapes that every version reads alike, for machines with different versions. */
const MIXED = ["clean", "second commit", "detached HEAD", "worktree", "directory", "shallow clone, deepened"]

type Observed = { code: number; value: unknown }
type Pair = { client: NixVersion; host: NixVersion }

/** Evaluates a shape here and there, before and after its change: [here, there] for each run. */
async function observe(client: Client, shape: Shape, at: number): Promise<[Observed, Observed][]> {
  const here = `/root/s${at}`
  const prelude = `here=${here}; edict() { '${EDICT}' "$@"; }\n${SETUP_FUNCTIONS}\n`
  const script = async (text: string, what: string) => {
    const result = await client.sh(`${prelude}${text}`, { cwd: here })
    if (result.code !== 0) throw new Error(`${shape.name}: ${what}: ${result.stdout}${result.stderr}`)
    return result.stdout.trim()
  }
  await client.sh(`mkdir -p ${here}`)
  await script(`exec 3>&1 >&2\n${shape.setup}\npwd >${here}.cwd`, "set-up")
  const end = (await client.sh(`cat ${here}.cwd`)).stdout.trimEnd()
  const cwd = end === here ? `${here}/p` : end
  const runs: [Observed, Observed][] = []
  for (const change of shape.change === undefined ? [undefined] : [undefined, shape.change]) {
    if (change !== undefined) await script(`cd p\n${change}`, "change")
    const words = shape.words ?? EVALUATION
    const local = await client.sh(`nix ${words}`, { cwd })
    const remote = await client.sh(`${shellWords([EDICT])} h nix ${words}`, { cwd })
    runs.push([observed(local), observed(remote)])
  }
  return runs
}

/** What can be compared of an evaluation: its value, or that it failed. */
function observed(result: Result): Observed {
  if (result.code !== 0) return { code: result.code, value: result.stderr }
  try {
    return { code: 0, value: JSON.parse(result.stdout) as unknown }
  } catch {
    return { code: 0, value: result.stdout }
  }
}

// ── The matrix ───

const VERSIONS: NixVersion[] = ["2.8", "2.26", "2.34"]
const PAIRS: Pair[] = [
  ...VERSIONS.map((version) => ({ client: version, host: version })),
  { client: "2.8", host: "2.34" },
  { client: "2.34", host: "2.8" },
]

/** Shapes that run at the same time. */
const AT_ONCE = 4

for (const pair of PAIRS) {
  const missing = (await Promise.all([pair.client, pair.host].map(nixAvailable))).find((had) => had !== true)
  const title = `Nix ${pair.client} here, ${pair.host} there`
  if (missing !== undefined) console.log(`skipped: ${title}: ${missing}`)
  describe.skipIf(missing !== undefined)(title, () => matrix(pair))
}

/** One test for each shape; all of them run from the start, some at once. */
function matrix(pair: Pair): void {
  const mixed = pair.client !== pair.host
  const shapes = SHAPES.filter(({ name }) => !mixed || MIXED.includes(name)).filter(
    ({ name }) => !process.env.EDICT_SHAPE || name.match(process.env.EDICT_SHAPE),
  )
  const outcomes = new Map(shapes.map(({ name }) => [name, Promise.withResolvers<[Observed, Observed][]>()]))
  let machines: AsyncDisposable[] = []

  beforeAll(async () => {
    const host = await startHost({ name: "h", nix: pair.host })
    const client = await startClient({ hosts: [host], nix: pair.client, flakes: true })
    machines = [client, host]
    writeFileSync(client.outside("/root/flake.nix"), FLAKE)
    // The first use of a store makes its database.
    await Promise.all(
      [client, host].map((machine) => machine.sh("nix-store --init; nix-store --add /etc/hostname")),
    )
    // A remote home that is somebody's git repository must not matter.
    await host.sh(
      "git init -q && git config user.email h && git config user.name h && git commit -q --allow-empty -m home",
    )
    const waiting = [...shapes]
    const work = async () => {
      for (let shape = waiting.shift(); shape; shape = waiting.shift())
        await observe(client, shape, shapes.indexOf(shape)).then(
          outcomes.get(shape.name)!.resolve,
          outcomes.get(shape.name)!.reject,
        )
    }
    for (const { promise } of outcomes.values()) promise.catch(() => undefined)
    for (let count = 0; count < AT_ONCE; count++) void work()
  })

  afterAll(async () => {
    for (const machine of machines) await machine[Symbol.asyncDispose]()
  })

  for (const shape of shapes)
    test(shape.name, async () => {
      for (const [run, [here, there]] of (await outcomes.get(shape.name)!.promise).entries()) {
        const unreadable = run === 0 ? shape.unreadable?.[pair.client] : undefined
        if (unreadable !== undefined)
          expect([here.code, there.code], unreadable).toEqual([1, shape.mendedThere ? 0 : 1])
        else {
          expect(here).toMatchObject({ code: 0 })
          expect(there).toEqual(here)
        }
      }
    })
}

// ── Git over there ───

describe("git over there", () => {
  let client: Client, host: Host
  const tree = (at: string) => `/root/.cache/edict/*/tree${at}`

  beforeAll(async () => {
    host = await startHost({ name: "h" })
    client = await startClient({ hosts: [host], flakes: true })
    writeFileSync(client.outside("/root/flake.nix"), FLAKE)
  })

  afterAll(async () => {
    await client.stop()
    await host.stop()
  })

  /** Makes the repository /root/NAME/p; what it prints comes back. */
  async function make(name: string, script: string): Promise<string> {
    const text = `here=/root/${name}; mkdir "$here"; cd "$here"\n${SETUP_FUNCTIONS}\nexec 3>&1 >&2\n${script}`
    return succeed(await client.sh(text))
  }

  /** Runs a script in the project over there, as a program of its flake. */
  async function there(name: string, script: string): Promise<string> {
    return succeed(
      await client.run([EDICT, "h", "nix", "run", ".#sh", "--", script], { cwd: `/root/${name}/p` }),
    )
  }

  async function here(name: string, script: string): Promise<string> {
    return succeed(await client.sh(script, { cwd: `/root/${name}/p` }))
  }

  function succeed(result: Result): string {
    expect(result).toMatchObject({ code: 0 })
    return result.stdout
  }

  const LOOK = `
    for question in 'status --porcelain=v2 --branch' 'diff HEAD' 'diff HEAD~1' 'diff --cached' 'describe' 'describe --tags --dirty' \\
      'rev-list --count HEAD' 'log --format=%H%n%an%n%ae%n%s' 'show --stat HEAD' 'branch --show-current' 'ls-files --stage' \\
      'tag -n' 'config user.name' 'config user.email' 'check-ignore ignored local'; do
      echo "# $question"; git $question
    done`

  test("looks as it does here", async () => {
    await make(
      "look",
      `repo; git config user.name 'Jörg "J" Ö'; git switch -qc größe; git tag -am one v1; echo two >a.txt; save second; git tag light
      echo local >.git/info/exclude; git mv run.sh moved.sh; echo three >a.txt; echo new >new.txt; git add -N new.txt
      echo staged >'st ä.txt'; git add st*; echo later >'st ä.txt'; echo x >untracked; rm -r sub; chmod +x name.txt`,
    )
    const seen = await here("look", LOOK)
    expect(seen).toContain("Jörg")
    expect(await there("look", LOOK)).toBe(seen)
  })

  test("looks as it does here from a worktree, and with a detached HEAD", async () => {
    await make(
      "work",
      `repo; save second; cd ..; mv p o; git -C o worktree add -q ../p --detach; cd p; echo two >a.txt`,
    )
    expect(await there("work", LOOK)).toBe(await here("work", LOOK))
  })

  test("looks as it does here with filters, and leaves filtered files alone", async () => {
    await make(
      "filters",
      `repo; echo '*.big filter=big' >.gitattributes
      git config filter.big.clean 'tr a-z A-Z'; git config filter.big.smudge 'tr A-Z a-z'; git config filter.big.required true
      echo content >x.big; echo other >y.big; save filter; save filter; old; echo edited >y.big; git config --get filter.big.clean >&3`,
    )
    expect(await here("filters", "git status --porcelain")).toBe(" M y.big\n")
    const script = "touch x.big; git status --porcelain; git add x.big; git diff --cached --name-only"
    expect(await there("filters", script)).toBe(" M y.big\n")
    expect(
      await there("filters", "git add y.big; git show :y.big; git reset -q --hard; cat x.big"),
    ).toContain("edited")
  })

  test("adds and commits as the user", async () => {
    await make(
      "commit",
      "repo; git config user.name Somebody; git config user.email some@body; echo two >a.txt",
    )
    const script =
      "echo new >new.txt; git add new.txt; git commit -qam made; git log -1 --format='%an <%ae> %s'; git status -s"
    expect(await there("commit", script)).toBe("Somebody <some@body> made\n")
    const again =
      "git commit -qm x --allow-empty; git commit -q --amend -m y --allow-empty; git log --format=%s"
    expect(await there("commit", again)).toBe("y\nmade\nfirst\n")
  })

  test("makes the first commit", async () => {
    await make("first", "flake p; cd p; git init -q; files; git add -A")
    expect(await there("first", "git commit -qm first && git log --format=%s && git status -s")).toBe(
      "first\n",
    )
  })

  test("commits a submodule's files, too", async () => {
    await make("module", "submodule; echo two >module/m.txt")
    expect(
      await there("module", "git status -s; cd module; git commit -qam two; git log -1 --format=%s"),
    ).toBe(" m module\ntwo\n")
  })

  test("hooks, credentials and foreign config stay here", async () => {
    await make(
      "secret",
      `submodule; git config http.extraHeader 'Authorization: hunter2'; git config credential.helper '!echo hunter2'
      git config url.https://user:hunter2@example.org/.insteadOf gh:; git config core.sshCommand 'ssh hunter2'
      git config remote.origin.url https://user:hunter2@example.org/x; git config submodule.module.url https://hunter2@example.org
      git config include.path ../hunter2; git config alias.hunter2 status; git config filter.f.clean 'cat hunter2'
      git config core.fsmonitor 'touch /tmp/hunter2;:'; echo '*.f filter=f' >.git/info/attributes; git -C module config http.proxy hunter2
      for hook in pre-commit post-index-change post-checkout reference-transaction; do
        printf '#!/bin/sh\ntouch /tmp/hunter2\nexit 1 # hunter2\n' >.git/hooks/$hook; chmod +x .git/hooks/$hook
      done
      git config core.hooksPath .git/hooks; echo hunter2 >.git/description; echo hunter2 >.git/COMMIT_EDITMSG; echo two >a.txt`,
    )
    expect(
      await there(
        "secret",
        "git commit -qam x; git log -1 --format=%s; ls .git module/.git | grep -ic hook || true",
      ),
    ).toBe("x\n0\n")
    const found = await host.sh(
      `cat ${tree("/root/secret/p")}/.git/config >&2; grep -rl hunter2 .cache/edict`,
    )
    expect(found.stderr).toContain("[user]")
    expect(found.stdout).toBe("")
    expect(await here("secret", "ls /tmp")).not.toContain("hunter2")
  })

  test("old content stays here until a reference asks for it; a commit sends a small pack", async () => {
    const PACKS = `cd ${tree("/root/long/p")}/.git/objects/pack && stat -c '%s %i %n' *.pack | sort -n`
    const packs = async () =>
      succeed(await host.sh(PACKS))
        .trim()
        .split("\n")
    const old = await make(
      "long",
      `repo; head -c 3000000 /dev/urandom >big; save big; git rev-parse HEAD HEAD:big >&3; git rm -q big; save less
      for n in $(seq 100); do echo $n >a.txt; git commit -qam $n; done`,
    )
    const [rev, blob] = old.trim().split("\n")
    const has = (object: string) => host.sh(`git -C ${tree("/root/long/p")} cat-file -e ${object}`)
    expect(await there("long", "git rev-list --count HEAD; git diff --stat HEAD~1 | tail -1")).toBe(
      "103\n 1 file changed, 1 insertion(+), 1 deletion(-)\n",
    )
    expect((await has(`${rev}`)).code).toBe(0)
    expect((await has(`${blob}`)).code).not.toBe(0)
    const [first, ...more] = await packs()
    expect(more).toEqual([])
    expect(Number.parseInt(first!)).toBeLessThan(40_000)

    await here("long", "echo again >a.txt; git commit -qam again")
    expect(await there("long", "git log -1 --format=%s")).toBe("again\n")
    const [second, ...before] = await packs()
    expect(before).toEqual([first!])
    expect(Number.parseInt(second!)).toBeLessThan(1000)

    const words = ["eval", "--json", `.?rev=${rev}#all`]
    const [evaluated, same] = await Promise.all([
      client.run([EDICT, "h", "nix", ...words], { cwd: "/root/long/p" }),
      client.run(["nix", ...words], { cwd: "/root/long/p" }),
    ])
    expect(succeed(evaluated)).toBe(succeed(same))
    expect((await has(`${blob}`)).code).toBe(0)
    expect(await packs()).toContain(first!)

    // What is there already does not travel again.
    await there("long", "git log -1 >/dev/null")
    expect((await packs()).length).toBe(3)
  })

  test.each([
    "nix path-info --derivation .",
    "nix show-derivation .",
    "nix path-info --derivation path:.",
    "nix build --no-link --json .",
  ])("%s", async (command) => {
    const name = command.replace(/\W+/g, "-")
    await make(name, "repo; echo two >a.txt")
    expect(await here(name, `'${EDICT}' h ${command}`)).toBe(await here(name, command))
  })
})

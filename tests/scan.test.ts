import { describe, expect, test } from "bun:test"
import { isNixProgram, scan, type Reference } from "../edict"
import vectors from "./vectors.json"

const hello = "/nix/store/aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa-hello"
const drv = `${hello}.drv`
const links: Readonly<Record<string, string>> = {
  result: hello,
  "hello.drv": drv,
  chain: "sub/second",
  "sub/second": "../result",
  link: "sub",
  bin: `${hello}/bin`,
  loop: "loop",
}
const look = (path: string) => links[path]

/** A reference as the vectors write it: kind(path?query#fragment^outputs). */
function classOf({ kind, word, prefix, scheme, path, query, suffix, target }: Reference): string {
  if (kind === "store-link") return target === hello && suffix === "" ? kind : `${kind}(${target}${suffix})`
  const isEmpty = path === "." && !word.slice(prefix.length + scheme.length).startsWith(".")
  const typed = isEmpty ? "" : scheme ? path.replaceAll("%", "%25") : path
  return `${kind}(${scheme}${typed}${query}${suffix})`
}

function classes(program: string, words: readonly string[]): string[] {
  const { references } = scan(program, words, look)
  return words.map((_, index) => {
    const found = references.filter((reference) => reference.index === index)
    return found.map((one) => one.prefix + classOf(one)).join() || "keep"
  })
}

const withoutPrefix = (text: string) => text.replace(/^-f/, "")
const locate = (text: string) => text.replaceAll("$FIXTURE", "/fixture")

describe("what Nix itself does", () => {
  test.each(vectors.map((vector) => [vector.id, vector] as const))("vector %d", (_, vector) => {
    const words = vector.argv.map(locate)
    expect(classes("nix", words).map(withoutPrefix)).toEqual(vector.classes.map(locate))
    expect(scan("nix", words, look).implicit === "flake").toBe(vector.implicitDot)
  })
})

/** Splits at spaces; '' is the empty word and _ a space. */
function parse(line: string): [program: string, words: string[]] {
  const [program = "", ...words] = line.split(" ")
  return [program, words.map((word) => (word === "''" ? "" : word.replaceAll("_", " ")))]
}

/** The words that are not kept. */
const named = (line: string) => classes(...parse(line)).filter((one) => one !== "keep")

describe("flake references", () => {
  test.each([
    [".", ["flake(.)"]],
    ["..", ["flake(..)"]],
    ["../x", ["flake(../x)"]],
    ["x/", ["flake(x/)"]],
    ["/abs/", ["flake(/abs/)"]],
    ["my-flake", ["keep"]],
    ["foo/bar", ["keep"]],
    ["foo/0123456789012345678901234567890123456789", ["keep"]],
    ["foo/@x", ["keep"]],
    ["foo/./bar", ["flake(foo/./bar)"]],
    ["foo/.hid", ["flake(foo/.hid)"]],
    ["foo/bar/../x", ["keep"]],
    ["-foo", ["keep"]],
    ["ünï", ["flake(ünï)"]],
    ["./a:b", ["flake(./a:b)"]],
    ["~", ["flake(~)"]],
    ["#x", ["flake(#x)"]],
    ["?dir=x", ["flake(?dir=x)"]],
    [".?dir=x^out", ["flake(.?dir=x^out)"]],
    [".#a?b#c/d", ["flake(.#a?b#c/d)"]],
    [".#a:b", ["flake(.#a:b)"]],
    [".#.packages.x^dev,out", ["flake(.#.packages.x^dev,out)"]],
    ["foo#a^dev", ["keep"]],
    ["foo^dev", ["keep"]],
    ["c^d", ["keep"]],
    ["./c^d", ["flake(./c^d)"]],
    ["./c^d/e", ["flake(./c^d/e)"]],
    ["foo#a[b]", ["flake(foo#a[b])"]],
    ["foo#a%20b", ["keep"]],
    ["path:", ["flake(path:)"]],
    ["path:x", ["flake(path:x)"]],
    ["path:x?dir=y#z^out", ["flake(path:x?dir=y#z^out)"]],
    ["path:/abs", ["flake(path:/abs)"]],
    ["path:./with_space", ["flake(path:./with space)"]],
    ["git+file:sub", ["flake(git+file:sub)"]],
    ["git+file:///abs?ref=main", ["flake(git+file:/abs?ref=main)"]],
    ["hg+file:///abs", ["flake(hg+file:/abs)"]],
    ["file:///x.tar.gz", ["file(file:/x.tar.gz)"]],
    ["tarball+file:///x.tar", ["file(tarball+file:/x.tar)"]],
    ["file+file:///x", ["file(file+file:/x)"]],
    ["file://host/x.tar.gz", ["keep"]],
    ["git+ssh://host/x", ["keep"]],
    ["https://x.org/a.tar.gz#y", ["keep"]],
    ["git+https:x", ["keep"]],
    ["sourcehut:~a/b", ["keep"]],
    ["A:b", ["flake(A:b)"]],
  ])("nix build %s", (word, expected) => {
    expect(classes(...parse(`nix build ${word}`)).slice(1)).toEqual(expected)
  })

  test("a URL is decoded, a plain path is not", () => {
    const paths = scan("nix", ["build", "path:./a%20b", "./a%20b", "path:%ff"], look).references.map(
      (one) => one.path,
    )
    expect(paths).toEqual(["./a b", "./a%20b", "%ff"])
  })

  test("an empty path is the current directory", () => {
    expect(scan("nix", ["build", "#x", "path:#y"], look).references.map((one) => one.path)).toEqual([
      ".",
      ".",
    ])
  })

  test("only a plain path is searched upwards, and not for --override-input", () => {
    const words = [
      "build",
      "./a",
      "path:./a",
      "git+file:.",
      "--override-input",
      "i",
      "./a",
      "--override-flake",
      "f",
      "./a",
    ]
    const searches = scan("nix", words, look).references.map((one) => one.search)
    expect(searches).toEqual(["upwards", "exact", "exact", "exact", "upwards"])
  })
})

describe("store paths and links to them", () => {
  test.each([
    [hello, "keep"],
    [`${hello}/bin`, "keep"],
    [`${drv}^*`, "keep"],
    [`${drv}^out^dev`, "keep"],
    [`${hello}?dir=x`, "keep"], // "?" may stand in the name of a store path
    [`${hello}/sub#x`, "keep"], // Nix drops what follows the store path
    [`${hello}#x`, `flake(${hello}#x)`],
    ["/nix/store", "flake(/nix/store)"],
    ["/nix/store/x", "flake(/nix/store/x)"],
    ["./result", "store-link"],
    ["./result/", "store-link"],
    ["./sub/../result", "store-link"],
    ["./chain", "store-link"],
    ["./bin", "store-link"],
    ["./hello.drv^out", `store-link(${drv}^out)`],
    ["result", "keep"],
    ["./result/bin", "flake(./result/bin)"],
    ["./result?dir=x", "flake(./result?dir=x)"],
    ["./link", "flake(./link)"],
    ["./loop", "flake(./loop)"],
  ])("nix path-info %s", (word, expected) => {
    expect(classes("nix", ["path-info", word])[1]).toBe(expected)
  })

  test("only installables are followed", () => {
    expect(named("nix flake show ./result")).toEqual(["flake(./result)"])
    expect(named("nix store cat ./result/bin/x")).toEqual([])
  })
})

describe("options", () => {
  test.each([
    ["nix build -o ./out .#x", ["path-out(./out)", "flake(.#x)"]],
    ["nix build -Lo./out .#x", ["-Lopath-out(./out)", "flake(.#x)"]],
    ["nix build -L./x", ["-Lflake(./x)"]],
    ["nix build -fx.nix ./a", []],
    ["nix build .#x -f ./y", ["path-in(./y)"]],
    ["nix build -f - x", []],
    ["nix build -f <nixpkgs> x", []],
    ["nix build -f channel:nixos x", []],
    ["nix build -f https://x.org/y x", []],
    ["nix build -f file:///x.tar.gz x", ["file(file:/x.tar.gz)"]],
    ["nix build -f flake:foo x", []],
    ["nix build -f flake:./foo x", []],
    ["nix build -f flake:/foo x", ["flake:flake(/foo)"]],
    ["nix build --expr ./a ./b", []],
    [
      "nix eval .#x -I n=./p -I ./q -I n=flake:reg -I https://x.org/y",
      ["flake(.#x)", "n=path-in(./p)", "path-in(./q)"],
    ],
    [
      "nix eval .#x -I n=flake:path:/p -I n=file:///t.tar",
      ["flake(.#x)", "n=flake:flake(path:/p)", "n=file(file:/t.tar)"],
    ],
    ["nix eval .#x -I n=flake:./p -I n=channel:x -I n=", ["flake(.#x)"]],
    ["nix eval .#x --arg-from-file n ./p --write-to ./w", ["flake(.#x)", "path-in(./p)", "path-out(./w)"]],
    ["nix eval .#x --apply ./f --arg a ./g --argstr b ./h", ["flake(.#x)"]],
    [
      "nix build .#x --eval-profile-file ./p --json-log-path ./j",
      ["flake(.#x)", "path-out(./p)", "path-out(./j)"],
    ],
    ["nix build .#x --store ./s --substituters file:///x --netrc-file ./n", ["flake(.#x)"]],
    ["nix build --extra-future-setting ./v --no-future --future .#x", ["flake(.#x)"]],
    [
      "nix build --sandbox --relaxed-sandbox --accept-flake-config --keep-going --build-use-sandbox .#x",
      ["flake(.#x)"],
    ],
    ["nix build --build-cores 4 --commit-lockfile-summary ./m .#x", ["flake(.#x)"]],
    ["nix --option a b -v --max-jobs 3 build .#x", ["flake(.#x)"]],
    ["nix -- build .#x", ["flake(.#x)"]],
    ["nix run .#p a --offline ./b --log-format raw ./c", ["flake(.#p)"]],
    ["nix copy -s --to ssh://h --from ./cache .#x", ["flake(.#x)"]],
    ["nix path-info -s -S -h .#x", ["flake(.#x)"]],
    ["nix store verify -s https://c.org -n 2 .#x", ["flake(.#x)"]],
    ["nix develop -s A ./b -k C -u D .#x", ["flake(.#x)"]],
    ["nix develop -f x.nix --redirect a ./o", ["path-in(x.nix)", "path-out(./o)"]],
    ["nix why-depends -a .#a .#b ./c", ["flake(.#a)", "flake(.#b)"]],
    ["nix flake clone -f ./d ./src", ["path-out(./d)", "flake(./src)"]],
    ["nix flake show ./c^d", ["flake(./c^d)"]],
    ["nix flake new ./n -t templates#x", ["path-out(./n)"]],
    ["nix bundle --bundler ./b#x^out ./p", ["flake(./b#x^out)", "flake(./p)"]],
    ["nix build -o '' .#x --profile ./p", ["flake(.#x)", "path-profile(./p)"]],
    ["nix upgrade-nix -p ./p", ["path-profile(./p)"]],
    ["nix store add --references-list-json ./r -n x ./p", ["path-in(./r)", "path-in(./p)"]],
    ["nix nar ls ./a.nar ./inside", ["path-in(./a.nar)"]],
    ["nix registry pin ./x", []],
    ["nix registry add x path:/abs", ["flake(path:/abs)"]],
    ["nix registry add x path:./rel", []],
    ["nix profile upgrade ./x", []],
    ["nix profile remove ./x", []],
    ["nix search . ./regex", ["flake(.)"]],
    ["nix search -e ./no . x", ["flake(.)"]],
    ["nix repl ./x -f ./y", ["path-in(./y)"]],
    ["nix eval .#a ./b", ["flake(.#a)"]],
    ["nix fmt ./a .#b", []],
    ["nix store prefetch-file file:///x", []],
    ["nix dev-shell .#x -c y .#z", ["flake(.#x)"]],
    ["nix sign-paths -k ./key .#x", ["path-in(./key)", "flake(.#x)"]],
    ["nix hash-file ./x", ["path-in(./x)"]],
    ["nix build --help .#x", []],
    ["nix --version", []],
    ["nom build .#x", ["flake(.#x)"]],
  ])("%s", (line, expected) => {
    expect(named(line)).toEqual(expected)
  })
})

describe("legacy programs", () => {
  test.each([
    ["nix-build ./a.nix -A x -o ./out", ["path-in(./a.nix)", "path-out(./out)"]],
    ["nix-build release.nix --arg a ./b --argstr c ./d -j4 -k -K", ["path-in(release.nix)"]],
    ["nix-build <nixpkgs> -A x -I nixpkgs=./n", ["nixpkgs=path-in(./n)"]],
    ["nix-build https://x.org/y.tar.gz -A ./z", []],
    ["nix-build -E ./a", []],
    ["nix-build --expr ./a --option x ./y", []],
    ["nix-build -vE ./a", []],
    ["nix-build -- ./a", ["path-in(./a)"]],
    ["nix-build ./hello.drv", [`store-link(${drv})`]],
    [`nix-build ${drv}`, []],
    ["nix-build ./result", ["path-in(./result)"]],
    ["nom-build ./a", ["path-in(./a)"]],
    ["nix-shell ./s.nix --run ./x --command ./y --keep Z", ["path-in(./s.nix)"]],
    ["nix-shell -p hello ./x --run ./y", []],
    ["nix-shell --pure -I n=./p --packages hello", ["n=path-in(./p)"]],
    ["nom-shell ./a", ["path-in(./a)"]],
    ["nix-instantiate --eval --strict ./a -A b --add-root ./r", ["path-in(./a)", "path-out(./r)"]],
    ["nix-instantiate --find-file ./a", []],
    ["nix-store --add ./a ./b", ["path-in(./a)", "path-in(./b)"]],
    ["nix-store --add-fixed sha256 ./a", ["path-in(./a)"]],
    ["nix-store --dump ./a", ["path-in(./a)"]],
    ["nix-store --restore ./a", ["path-out(./a)"]],
    ["nix-store --generate-binary-cache-key n ./s ./p", ["path-out(./s)", "path-out(./p)"]],
    ["nix-store -qR result ./x", ["store-link"]],
    ["nix-store -r ./hello.drv --add-root ./r -k", [`store-link(${drv})`, "path-out(./r)"]],
    ["nix-store --gc --max-freed 1", []],
    ["nix-env -f ./a -iA hello -p ./prof", ["path-in(./a)", "path-profile(./prof)"]],
    ["nix-env -i ./result result", ["store-link"]],
    ["nix-env -S ./p", ["path-profile(./p)"]],
    ["nix-copy-closure --to ./result ./result", ["store-link"]],
    ["nix-hash --type sha256 ./a", ["path-in(./a)"]],
    ["nix-hash --to-base32 ./a --type sha1", []],
    [
      "nixos-rebuild build --flake .#host -I n=./p --override-input i ./j",
      ["flake(.#host)", "n=path-in(./p)", "flake(./j)"],
    ],
    ["nixos-rebuild-ng switch --flake=./x#h --target-host ./h", ["--flake=flake(./x#h)"]],
    ["nixos-rebuild build -f ./sys.nix -A x", ["path-in(./sys.nix)"]],
    ["darwin-rebuild switch --flake ./x", ["flake(./x)"]],
    ["home-manager switch -b ./bak -f ./home.nix", ["path-in(./home.nix)"]],
  ])("%s", (line, expected) => {
    expect(named(line)).toEqual(expected)
  })
})

describe("the default, and where to spell it out", () => {
  test.each([
    ["nix build", "flake", 1],
    ["nix -L build -L", "flake", 2],
    ["nix build --", "flake", 1],
    ["nix shell -c x", "flake", 1],
    ["nix env shell -c x", "flake", 2],
    ["nix --offline flake check", "flake", 3],
    ["nix flake --json", "none", -1],
    ["nix search", "flake", 1],
    ["nix bundle --bundler ./b", "flake", 1],
    ["nix develop --redirect ./a ./o", "flake", 1],
    ["nix build -f x.nix", "none", -1],
    ["nix eval --expr 1", "none", -1],
    ["nix build foo", "none", -1],
    ["nix build --stdin", "none", -1],
    ["nix copy --all", "none", -1],
    ["nix profile add", "flake", 2],
    ["nix repl", "none", -1],
    ["nix repl .", "none", -1],
    ["nix fmt", "flake", -1],
    ["nix fmt x", "flake", -1],
    ["nix formatter run", "flake", -1],
    ["nix formatter build", "flake", -1],
    ["nix flake update", "flake", -1],
    ["nix flake update a", "flake", -1],
    ["nix flake update ./a", "none", -1],
    ["nix flake update --flake ./a b", "none", -1],
    ["nix flake init", "none", -1],
    ["nix build --help", "none", -1],
    ["nix store gc", "none", -1],
    ["nom develop", "flake", 1],
    ["nix-build", "file", 0],
    ["nix-build -A x", "file", 0],
    ["nix-build x.nix", "none", -1],
    ["nix-build -E x", "none", -1],
    ["nix-build -", "none", -1],
    ["nix-shell --run x", "file", 0],
    ["nix-shell -p x", "none", -1],
    ["nix-instantiate --eval", "file", 0],
    ["nix-store -q", "none", -1],
    ["nixos-rebuild build --flake", "flake", 2],
    ["nixos-rebuild --flake -L build", "flake", 1],
    ["nixos-rebuild build", "none", -1],
    ["nixos-rebuild build -A x", "file", -1],
    ["nixos-rebuild build -A x -f y", "none", -1],
  ] as const)("%s", (line, implicit, insertAt) => {
    expect(scan(...parse(line), look)).toMatchObject({ implicit, insertAt })
  })
})

test.each([
  ["nix flake update", []],
  ["nix flake update nixpkgs a/b", [2, 3]],
  ["nix flake update ./x", [2]],
  ["nix flake update --flake ./x nixpkgs", []],
  ["nix flake lock ./x", []],
])("positionals of another meaning since Nix 2.19: %s", (line, expected) => {
  expect(scan(...parse(line), look).updatePositional).toEqual(expected)
})

test.each([
  ["nixpkgs", []],
  ["a/b", []],
  [".", ["flake(.)"]],
  ["~/x", ["flake(~/x)"]],
  ["/x", ["flake(/x)"]],
  ["path:x", ["flake(path:x)"]],
  ["github:o/r", []],
  ["1foo", ["flake(1foo)"]],
])("nix flake update %s", (word, expected) => {
  expect(named(`nix flake update ${word}`)).toEqual(expected)
})

test.each([
  ["nix build", "default"],
  ["nix build --no-link", "none"],
  ["nix build --dry-run", "none"],
  ["nix build -o a", { index: 2, path: "a" }],
  ["nix build -Lo./a", { index: 1, path: "./a" }],
  ["nix build -o a --out-link b", { index: 4, path: "b" }],
  ["nix build -o a --no-link", "none"],
  ["nix build --no-link -o a", { index: 3, path: "a" }],
  ["nix build -o ''", "none"],
  ["nix build -o", "default"],
  ["nix build -- -o a", "default"],
  ["nix bundle", "default"],
  ["nix formatter build", "default"],
  ["nix run", "none"],
  ["nix copy .", "none"],
  ["nix copy -o a .", { index: 2, path: "a" }],
  ["nix-build", "default"],
  ["nix-build --no-out-link", "none"],
  ["nix-build -o a", { index: 1, path: "a" }],
  ["nix-shell", "none"],
  ["nix-instantiate --add-root a", { index: 1, path: "a" }],
  ["nix-store -r --add-root a x", { index: 2, path: "a" }],
  ["nom-build", "default"],
  ["nixos-rebuild build --flake .#x", "default"],
  ["nixos-rebuild switch --flake .#x", "none"],
  ["nosuchcommand -o a", "none"],
] as const)("result links of %s", (line, expected) => {
  expect(scan(...parse(line), look).outLink).toEqual(expected)
})

test.each([
  ["nix build", undefined],
  ["nix build .#x", undefined],
  ["nix build .#packages.aarch64-linux.x", "aarch64-linux"],
  ["nix build .#x foo#checks.x86_64-darwin.y^out", "x86_64-darwin"],
  ['nix build .#legacyPackages."i686-linux".y', "i686-linux"],
  ["nix build .#.devShells.x86%5F64-freebsd.y", "x86_64-freebsd"],
  ["nix develop .#devShells.x86_64-freebsd.y", "x86_64-freebsd"],
  ["nix run .#apps.riscv64-linux.y -- .#apps.x86_64-linux.y", "riscv64-linux"],
  ["nix build .#packages.hello-world", undefined],
  ["nix build .#a.packages.x86_64-linux.x", undefined],
  ["nix build -f . packages.x86_64-linux.x", "x86_64-linux"],
  ["nix build --system armv7l-linux .#packages.x86_64-linux.x", "armv7l-linux"],
  ["nix build --option system armv7l-linux", "armv7l-linux"],
  ["nix build --system a --option system b", "b"],
  ["nix build --option x system --option y z", undefined],
  ["nix-build --system aarch64-linux", "aarch64-linux"],
])("the system of %s", (line, expected) => {
  const [program, words] = [line.split(" ")[0] ?? "", line.split(" ").slice(1)]
  expect(scan(program, words, look).system).toBe(expected)
})

test.each([
  ["nix build", "build"],
  ["nix shell", "env shell"],
  ["nix show-derivation", "derivation show"],
  ["nix profile install", "profile add"],
  ["nix ping-store", "store info"],
  ["nix flake info", "flake metadata"],
  ["nix store build-trace info", "store build-trace info"],
  ["nix flake nosuch ./x", ""],
  ["nix flake", ""],
  ["nix", ""],
  ["nom", ""],
  ["nom shell", "env shell"],
  ["nom-build", "nix-build"],
  ["nixos-rebuild-ng", "nixos-rebuild"],
  ["nix build --help", "build"],
])("the command of %s", (line, expected) => {
  expect(scan(...parse(line), look).command).toBe(expected)
})

test("a reference knows its word", () => {
  const words = ["eval", "-Inixpkgs", "-If./x", "a"]
  expect(scan("nix", ["eval", "-f./x", "-I", "n=./p"], look).references).toMatchObject([
    { index: 1, word: "-f./x", prefix: "-f", path: "./x" },
    { index: 3, word: "n=./p", prefix: "n=", path: "./p" },
  ])
  for (const { word, prefix, path } of scan("nix", words, look).references) expect(prefix + path).toBe(word)
})

test("installables from standard input", () => {
  expect(scan("nix", ["build", "--stdin"], look).stdin).toBe(true)
  expect(scan("nix", ["build"], look).stdin).toBe(false)
})

test("programs of the Nix family", () => {
  for (const word of ["nix", "nix-build", "nix-shell", "nom", "nixos-rebuild", "home-manager"])
    expect(isNixProgram(word)).toBe(true)
  for (const word of ["nixpkgs", ".", "nixpkgs#hello", "", "./nix", "constructor"])
    expect(isNixProgram(word)).toBe(false)
})

# Just enough of nixpkgs to evaluate ../../flake.nix without the network (tests/flake.test.ts). Builds nothing.
{
  outputs = _:
    let
      genAttrs = names: f: builtins.listToAttrs (map (name: { inherit name; value = f name; }) names);

      packagesFor = system:
        let
          mkDerivation = attrs: derivation (removeAttrs attrs [ "meta" ] // {
            inherit system;
            name = attrs.name or "${attrs.pname}-${attrs.version}";
            builder = "/bin/sh";
          }) // { meta = attrs.meta or { }; };
          tool = name: mkDerivation { inherit name; };
        in
        genAttrs [ "bash" "bun" "cacert" "coreutils" "git" "gnutar" "makeWrapper" "nix" "nodejs" "openssh" "rsync" "shellcheck" ] tool // {
          lib.makeBinPath = tools: builtins.concatStringsSep ":" (map (t: "${t}/bin") tools);
          mkShell = attrs: mkDerivation ({ name = "nix-shell"; } // attrs);
          runCommand = name: attrs: buildCommand: mkDerivation (attrs // { inherit name buildCommand; });
          stdenv = { inherit mkDerivation; };
          stdenvNoCC = { inherit mkDerivation; };
        };
    in
    {
      lib = { inherit genAttrs; };
      legacyPackages = genAttrs [ "x86_64-linux" "aarch64-linux" "x86_64-darwin" "aarch64-darwin" ] packagesFor;
    };
}

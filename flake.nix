{
  description = "Run any Nix command on another machine as if it ran here";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixpkgs-unstable";

  outputs = { self, nixpkgs }:
    let
      inherit (builtins.fromJSON (builtins.readFile ./package.json)) version;

      forEachSystem = f: nixpkgs.lib.genAttrs
        [ "x86_64-linux" "aarch64-linux" "x86_64-darwin" "aarch64-darwin" ]
        (system: f nixpkgs.legacyPackages.${system} self.packages.${system}.default);

      # Of this directory only the named files, so that an edit of the README rebuilds nothing.
      source = names: builtins.path {
        name = "edict-source";
        path = ./.;
        filter = path: _: builtins.elem (baseNameOf path) names;
      };

      # What bun.lock pins: plain JavaScript, the same on every system. After a change of bun.lock set
      # outputHash to pkgs.lib.fakeHash and take the hash that the failed build names.
      nodeModules = pkgs: pkgs.stdenvNoCC.mkDerivation {
        pname = "edict-node-modules";
        inherit version;
        src = source [ "package.json" "bun.lock" ];
        nativeBuildInputs = [ pkgs.bun pkgs.cacert ];
        buildPhase = ''
          export HOME=$TMPDIR
          bun install --frozen-lockfile --production --ignore-scripts --no-progress --linker=hoisted
          rm -r node_modules/.bin
        '';
        installPhase = "mv node_modules $out";
        dontFixup = true;
        outputHashMode = "recursive";
        outputHashAlgo = "sha256";
        outputHash = "sha256-abnhZfcnlckG3VT0DtZPuDVOoIJpwu4OxDpaRW4i4yo=";
      };

      # One JavaScript file and a wrapper. The user's own ssh and nix win over ours: their configuration,
      # agent and patches belong to them; the other tools are those that edict was tested with.
      package = pkgs: pkgs.stdenvNoCC.mkDerivation {
        pname = "edict";
        inherit version;
        src = source [ "edict.ts" "package.json" ];
        nativeBuildInputs = [ pkgs.bun pkgs.makeWrapper ];
        buildPhase = ''
          ln -s ${nodeModules pkgs} node_modules
          bun build edict.ts --target=bun --outfile=edict.js
        '';
        installPhase = ''
          install -D edict.js $out/lib/edict.js
          makeWrapper ${pkgs.bun}/bin/bun $out/bin/edict \
            --add-flags "--no-env-file --config=/dev/null $out/lib/edict.js" \
            --prefix PATH : ${with pkgs; lib.makeBinPath [ bash coreutils git gnutar rsync ]} \
            --suffix PATH : ${with pkgs; lib.makeBinPath [ openssh nix ]}
        '';
        meta = { description = "Run any Nix command on another machine as if it ran here"; mainProgram = "edict"; };
      };
    in
    {
      packages = forEachSystem (pkgs: _: { default = package pkgs; });

      apps = forEachSystem (_: edict: {
        default = { type = "app"; program = "${edict}/bin/edict"; };
      });

      devShells = forEachSystem (pkgs: _: {
        default = pkgs.mkShell {
          packages = with pkgs; [ bun git gnutar nodejs openssh rsync shellcheck ];
        };
      });

      checks = forEachSystem (pkgs: edict: {
        inherit edict;
        starts = pkgs.runCommand "edict-starts" { } ''
          ${edict}/bin/edict --version | grep -F ${version}
          ${edict}/bin/edict --help > $out
        '';
      });
    };
}

{
  description = "Run a Nix command on another machine as if it ran here";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixpkgs-unstable";

  outputs = { self, nixpkgs }:
    let
      inherit (nixpkgs) lib;
      inherit (builtins.fromJSON (builtins.readFile ./package.json)) description version;

      forEachSystem = f: lib.genAttrs
        [ "x86_64-linux" "aarch64-linux" "x86_64-darwin" "aarch64-darwin" ]
        (system: f nixpkgs.legacyPackages.${system} self.packages.${system}.default);

      # Of this directory only these, so that an edit of the README rebuilds nothing.
      source = paths: lib.fileset.toSource { root = ./.; fileset = lib.fileset.unions paths; };

      # What bun.lock pins, without the tools of development: plain JavaScript, the same on every system.
      # After a change of bun.lock `bun run update-hash` writes the new hash.
      nodeModules = pkgs: pkgs.stdenvNoCC.mkDerivation {
        pname = "edict-node-modules";
        inherit version;
        src = source [ ./package.json ./bun.lock ];
        nativeBuildInputs = [ pkgs.bun pkgs.cacert ];
        buildPhase = ''
          export HOME=$TMPDIR
          bun install --frozen-lockfile --production --ignore-scripts --no-progress --linker=hoisted
          rm -rf node_modules/.bin
        '';
        installPhase = "mv node_modules $out";
        dontFixup = true;
        impureEnvVars = lib.fetchers.proxyImpureEnvVars ++ [ "BUN_CONFIG_REGISTRY" ];
        outputHashMode = "recursive";
        outputHashAlgo = "sha256";
        outputHash = "sha256-abnhZfcnlckG3VT0DtZPuDVOoIJpwu4OxDpaRW4i4yo=";
      };

      tools = pkgs: with pkgs; [ bash coreutils findutils gawk git gnugrep gnused gnutar rsync zstd ];

      # One JavaScript file and a wrapper. The user's own ssh and nix win over ours: their configuration,
      # agent and patches belong to them; the other tools are those that edict was tested with.
      package = pkgs: pkgs.stdenvNoCC.mkDerivation {
        pname = "edict";
        inherit version;
        src = source [ ./edict.ts ./package.json ./tests/man.ts ];
        nativeBuildInputs = [ pkgs.bun pkgs.installShellFiles pkgs.makeWrapper ];
        buildPhase = ''
          export HOME=$TMPDIR
          ln -s ${nodeModules pkgs} node_modules
          bun build edict.ts --target=bun --outfile=edict.js
          bun tests/man.ts >edict.1
        '';
        installPhase = ''
          install -D -m 644 edict.js $out/lib/edict.js
          makeWrapper ${pkgs.bun}/bin/bun $out/bin/edict \
            --add-flags "--no-env-file --config=/dev/null $out/lib/edict.js" \
            --prefix PATH : ${lib.makeBinPath (tools pkgs)} \
            --suffix PATH : ${with pkgs; lib.makeBinPath [ openssh nix ]}
          installManPage edict.1
          for shell in bash zsh fish; do
            bun --no-env-file edict.js --completion $shell >completion.$shell
            installShellCompletion --cmd edict --$shell completion.$shell
          done
        '';
        passthru.nodeModules = nodeModules pkgs;
        meta = {
          inherit description;
          license = lib.licenses.mit;
          platforms = lib.platforms.unix;
          mainProgram = "edict";
        };
      };

      # The tests that need neither the network nor root, with the package as the program.
      unitTests = pkgs: edict: pkgs.runCommand "edict-unit-tests"
        {
          src = source [
            ./bunfig.toml
            ./edict.ts
            ./package.json
            ./tests/arguments.test.ts
            ./tests/completion.test.ts
            ./tests/config.test.ts
            ./tests/lab
            ./tests/plan.test.ts
            ./tests/scan.test.ts
            ./tests/scripts.test.ts
            ./tests/support.ts
            ./tests/vectors.json
          ];
          nativeBuildInputs = with pkgs; [ bun dash fish git shellcheck zsh ];
        } ''
        cp -r $src work
        chmod -R u+w work
        cd work
        ln -s ${nodeModules pkgs} node_modules
        export HOME=$TMPDIR EDICT_BIN=${edict}/bin/edict
        bun test --timeout 120000
        touch $out
      '';

      # The hosts file, read once by edict itself: a wrong key fails here, and not at the first run. The machines
      # file that it may name is not there while this builds.
      hostsFile = pkgs: edict: settings:
        let write = (pkgs.formats.toml { }).generate "edict-config.toml"; in
        pkgs.runCommand "edict-config.toml" { } ''
          ${edict}/bin/edict --config ${write (removeAttrs settings [ "machines" ])} --complete-hosts >/dev/null
          cp ${write settings} $out
        '';

      # The options are the same for one user (home-manager) and for a whole machine (NixOS); `write` says
      # where package and hosts file go.
      module = { about, write }: { config, lib, pkgs, ... }:
        let cfg = config.programs.edict; in
        {
          options.programs.edict = {
            enable = lib.mkEnableOption "edict, which runs Nix commands on other machines";
            package = lib.mkOption {
              type = lib.types.package;
              default = self.packages.${pkgs.stdenv.hostPlatform.system}.default;
              defaultText = lib.literalMD "the package of edict's own flake";
              description = "The package of edict.";
            };
            settings = lib.mkOption {
              inherit (pkgs.formats.toml { }) type;
              default = { };
              example = {
                default = "big";
                hosts.big = { address = "ssh://builder@big.example.com"; tags = [ "ci" ]; };
              };
              description = "${about}: the hosts, as under \"Hosts file\" in the README.";
            };
          };
          config = lib.mkIf cfg.enable (write {
            inherit (cfg) package;
            file = lib.mkIf (cfg.settings != { }) { source = hostsFile pkgs cfg.package cfg.settings; };
          });
        };
    in
    {
      packages = forEachSystem (pkgs: _: rec { edict = package pkgs; default = edict; });

      apps = forEachSystem (_: edict:
        let app = { type = "app"; program = "${edict}/bin/edict"; meta = { inherit description; }; };
        in { edict = app; default = app; });

      overlays.default = final: _: { edict = package final; };

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
        unit = unitTests pkgs edict;
      });

      homeModules.default = module {
        about = "Content of ~/.config/edict/config.toml";
        write = { package, file }: {
          home.packages = [ package ];
          xdg.configFile."edict/config.toml" = file;
        };
      };

      nixosModules.default = module {
        about = "Content of /etc/edict/config.toml, for users without a hosts file of their own";
        write = { package, file }: {
          environment.systemPackages = [ package ];
          environment.etc."edict/config.toml" = file;
        };
      };
    };
}

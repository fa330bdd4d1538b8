# As much of nixpkgs as ../../flake.nix needs, made of the programs of this machine, for tests/flake.test.ts: it
# evaluates without the network, for all systems, and builds for the system here where Nix has no sandbox.
{
  outputs = _:
    let
      inherit (builtins) any attrNames concatMap concatStringsSep filter isAttrs substring stringLength toJSON;

      genAttrs = names: f: builtins.listToAttrs (map (name: { inherit name; value = f name; }) names);
      hasPrefix = prefix: text: substring 0 (stringLength prefix) text == prefix;

      fileset = {
        unions = files: map toString files;
        toSource = { root, fileset }: builtins.path {
          name = "source";
          path = root;
          filter = path: _: any (file: hasPrefix "${path}/" "${file}/" || hasPrefix "${file}/" path) fileset;
        };
      };

      # What a module defines where the user's own configuration is `settings`.
      applyModule = module: { pkgs, settings }:
        let
          defaults = set: builtins.mapAttrs (_: option: option.default or (defaults option)) set;
          merge = a: b: a // builtins.mapAttrs (name: value: if isAttrs (a.${name} or null) then merge a.${name} value else value) b;
          parts = module { inherit lib pkgs; config = merge (defaults parts.options) settings; };
        in
        parts.config;

      lib = {
        inherit applyModule fileset genAttrs;
        fetchers.proxyImpureEnvVars = [ "http_proxy" "https_proxy" ];
        licenses.mit.spdxId = "MIT";
        literalMD = text: { _type = "literalMD"; inherit text; };
        makeBinPath = tools: concatStringsSep ":" (map (tool: "${tool}/bin") tools);
        mkEnableOption = _: { default = false; };
        mkIf = condition: value: if condition then value else { };
        mkOption = option: option;
        platforms.unix = systems;
        types.package = "package";
      };

      # Tables of tables, and what is JSON and TOML alike.
      toTOML = path: table:
        let isTable = name: isAttrs table.${name}; in
        concatStringsSep "" (
          map (name: "${toJSON name} = ${toJSON table.${name}}\n") (filter (name: !isTable name) (attrNames table))
          ++ concatMap (name: let inner = path ++ [ (toJSON name) ]; in [ "[${concatStringsSep "." inner}]\n" (toTOML inner table.${name}) ])
            (filter isTable (attrNames table))
        );

      # The package's name, and the programs that it is needed for.
      tools = {
        bash = "bash";
        bun = "bun";
        cacert = "";
        coreutils = "basename cat chmod comm cp cut date dd dirname env head id join ln ls mkdir mkfifo mktemp mv od paste readlink realpath rm rmdir sha256sum sleep sort stat sync tail tee touch tr uname uniq wc";
        dash = "dash";
        findutils = "find xargs";
        fish = "fish";
        gawk = "awk";
        git = "git";
        gnugrep = "grep";
        gnused = "sed";
        gnutar = "tar";
        installShellFiles = "";
        makeWrapper = "";
        nix = "nix nix-build nix-store";
        nodejs = "node npm";
        openssh = "ssh ssh-keygen";
        rsync = "rsync";
        shellcheck = "shellcheck";
        zsh = "zsh";
        zstd = "zstd";
      };

      systems = [ "x86_64-linux" "aarch64-linux" "x86_64-darwin" "aarch64-darwin" ];

      packagesFor = system:
        let
          mkDerivation = attrs: derivation ({ inherit (pkgs) system; name = "${attrs.pname}-${attrs.version}"; } // removeAttrs attrs [ "meta" "passthru" ] // {
            builder = "/bin/bash";
            args = [ "-eu" ./builder.sh ];
          }) // { meta = attrs.meta or { }; } // attrs.passthru or { };
          runCommand = name: attrs: buildCommand: mkDerivation (attrs // { inherit name buildCommand; });
          tool = name: programs: runCommand name { inherit programs; } ''
            mkdir -p $out/bin
            for program in $programs; do
              if path=$(command -v "$program"); then ln -s "$path" $out/bin/; fi
            done
          '';
          pkgs = builtins.mapAttrs tool tools // {
            inherit lib runCommand system;
            extend = overlay: let final = pkgs // overlay final pkgs; in final;
            formats.toml = _: { type = "TOML"; generate = name: value: builtins.toFile name (toTOML [ ] value); };
            mkShell = attrs: mkDerivation ({ name = "nix-shell"; } // attrs);
            stdenv = { inherit mkDerivation; hostPlatform = { inherit system; }; };
            stdenvNoCC = { inherit mkDerivation; };
          };
        in
        pkgs;
    in
    {
      inherit lib;
      legacyPackages = genAttrs systems packagesFor;
    };
}

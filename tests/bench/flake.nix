# What the benchmark builds, with /bin/sh alone; the sizes are in settings.json. Whoever writes another text into
# salt.txt gets another `small` and another `chain`.
{
  outputs = { self }:
    let
      settings = builtins.fromJSON (builtins.readFile ./settings.json);
      salt = builtins.readFile ./salt.txt;

      build = name: more: script: derivation ({
        inherit name;
        inherit (settings) system;
        builder = "/bin/sh";
        args = [ "-euc" script ];
        PATH = "/bin:/usr/bin";
      } // more);

      numbers = builtins.genList (n: toString n);

      # One path that refers to so many others.
      referring = count: build "referring-${toString count}"
        { paths = map (n: builtins.toFile "path-${n}" n) (numbers count); }
        ''printf '%s\n' $paths >"$out"'';
    in
    {
      packages.${settings.system} = {
        small = build "small" { inherit salt; } ''printf %s "$salt" >"$out"'';
        one = referring 0;
        many = referring (settings.closure - 1);
        # Steps that need each other, in a row; the result refers to none of them.
        chain = builtins.foldl'
          (previous: n: build "step-${n}" { inherit previous; } ''wc -c <"$previous" >"$out"'')
          (build "step-first" { inherit salt; } ''printf %s "$salt" >"$out"'')
          (numbers (settings.chain - 1));
        big = build "big" { } ''head -c ${toString settings.big} /dev/urandom >"$out"'';
      };
    };
}

/** The files, but for flake.nix, of the project that the demo and the recorded session show. */
export const SOURCES = {
  ".gitignore": "result\n",
  "names.txt": "Ada\nGrace\n",
  "versions.txt": "curl 8.1\n",
  "integration-test.sh": `#!/bin/sh
echo "testing on $(hostname)"
while read -r name; do
  if [ "$name" = b ]; then echo "$name failed"; code=3; else echo "$name passed"; fi
done
exit "\${code:-0}"
`,
  "bump-versions.sh": `#!/bin/sh
sed -i 's/8.1/8.2/' versions.txt
echo "curl 8.1 -> 8.2" >>changes.txt
`,
}

/**
 * Runs a program as on a file system that cannot exchange two names: `bun no-exchange.ts PROGRAM ARGS…`. A seccomp
 * filter answers EINVAL to renameat2 with RENAME_EXCHANGE.
 */
import { dlopen, ptr } from "bun:ffi"

const SYSCALL = process.arch === "arm64" ? 276 : 316 // renameat2
const { symbols } = dlopen("libc.so.6", {
  prctl: { args: ["i32", "u64", "u64", "u64", "u64"], returns: "i32" },
  execv: { args: ["cstring", "ptr"], returns: "i32" },
})

/** Instructions of struct sock_filter: code, jump if true, jump if false, operand. */
const instructions: [code: number, yes: number, no: number, operand: number][] = [
  [0x20, 0, 0, 0], // load the number of the system call
  [0x15, 0, 3, SYSCALL],
  [0x20, 0, 0, 48], // load its fifth argument, the flags
  [0x15, 0, 1, 2], // RENAME_EXCHANGE
  [0x06, 0, 0, 0x0005_0000 | 22], // fail with EINVAL
  [0x06, 0, 0, 0x7fff_0000], // allow
]
const filter = Buffer.alloc(instructions.length * 8)
for (const [at, [code, yes, no, operand]] of instructions.entries()) {
  filter.writeUInt16LE(code, at * 8)
  filter.writeUInt8(yes, at * 8 + 2)
  filter.writeUInt8(no, at * 8 + 3)
  filter.writeUInt32LE(operand, at * 8 + 4)
}
const program = Buffer.alloc(16)
program.writeUInt16LE(instructions.length, 0)
program.writeBigUInt64LE(BigInt(ptr(filter)), 8)

const [noNewPrivileges, setSeccomp, filterMode] = [38, 22, 2]
if (symbols.prctl(noNewPrivileges, 1, 0, 0, 0) !== 0) throw new Error("prctl failed")
if (symbols.prctl(setSeccomp, filterMode, ptr(program), 0, 0) !== 0) throw new Error("seccomp failed")

const words = process.argv.slice(2).map((word) => Buffer.from(`${word}\0`))
const argv = Buffer.alloc((words.length + 1) * 8)
for (const [at, word] of words.entries()) argv.writeBigUInt64LE(BigInt(ptr(word)), at * 8)
symbols.execv(words[0]!, ptr(argv))
throw new Error("exec failed")

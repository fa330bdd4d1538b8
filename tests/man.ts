/**
 * Prints the man page: the text of `edict --help` as roff (man(7), for groff and mandoc alike), so that the two never
 * differ. `bun run man | man -l -` shows it. Its date is $SOURCE_DATE_EPOCH, else today.
 */

import { USAGE, VERSION } from "../edict"

/** What is typed and what it means. */
const columnsOf = (line: string): string[] => line.trim().split(/\s{2,}/)

/** The man page for a text laid out as USAGE is: title, "usage:", paragraphs, lines of options, "heading:" blocks. */
export function manPage(usage: string, date: string): string {
  const [title = "", ...blocks] = usage.trimEnd().split(/\n\n/)
  const isUsage = (block: string) => block.startsWith("usage:") || block.startsWith("       ")
  const forms = blocks.filter(isUsage).flatMap((block) => block.replace(/^usage:/, "      ").split("\n"))
  const rest = blocks.filter((block) => !isUsage(block))
  const isOptions = (block: string) => block.startsWith("  -")
  const isSection = (block: string) => /^[a-z ]+:[\n ]/.test(block)
  const text = rest.filter((block) => !isOptions(block) && !isSection(block))
  return [
    macro("TH", "EDICT", "1", date, `edict ${VERSION}`),
    macro("SH", "NAME"),
    `edict \\- ${prose(title.replace(/^[^:]*: /, ""))}`,
    macro("SH", "SYNOPSIS"),
    forms.map((line) => form(columnsOf(line)[0]!)).join("\n.br\n"),
    macro("SH", "DESCRIPTION"),
    ...forms.flatMap((line) => described(columnsOf(line), form)),
    ...text.flatMap((block) => [".P", paragraph(block)]),
    macro("SH", "OPTIONS"),
    ...rest.filter(isOptions).flatMap((block) => block.split("\n").flatMap(option)),
    ...rest.filter(isSection).flatMap(section),
    macro("SH", "SEE ALSO"),
    ".BR nix (1),\n.BR ssh (1),\n.BR ssh_config (5),\n.BR rsync (1)",
    "",
  ].join("\n")
}

/** One line of the options: names and values, two blanks or more, text. Throws if it has no text. */
function option(line: string): string[] {
  const columns = columnsOf(line)
  if (columns.length < 2) throw new Error(`what does it mean? ${line}`)
  return described(columns, names)
}

/** An item with its text; nothing for one that has no text. */
function described([item, ...text]: string[], set: (item: string) => string): string[] {
  return text.length === 0 ? [] : [".TP", set(item!), paragraph(text.join(" "))]
}

/** "exit codes: the command's own; …" or "examples:" with lines under it. */
function section(block: string): string[] {
  const [heading = "", ...after] = block.split(":")
  const text = after.join(":")
  const name = heading === "exit codes" ? "EXIT STATUS" : heading.toUpperCase()
  if (!text.startsWith("\n")) return [macro("SH", name), paragraph(text.trim())]
  const items = text.trim().split("\n")
  return [macro("SH", name), ...items.flatMap((line) => described(columnsOf(line), bold))]
}

/** A form of the command line: what is typed as it stands bold, what stands for something else in italics. */
function form(words: string): string {
  const set = (word: string) => (/^(edict|nix|--|\||--.*)$/.test(word) ? bold(word) : italic(word))
  return words.split(" ").map(set).join(" ")
}

/** Names of options bold, what they take in italics: "-o OPTION, -p PORT". */
function names(words: string): string {
  const set = (word: string) => (word.startsWith("-") ? bold(word) : italic(word))
  const list = words.split(", ").map((name) => name.split(" ").map(set).join(" "))
  return list.join(", ")
}

const bold = (text: string): string => `\\fB${literal(text)}\\fR`
const italic = (text: string): string => `\\fI${literal(text)}\\fR`

/** Text in lines of at most 80 characters, none of which roff takes for a request. */
function paragraph(text: string): string {
  const lines = text.split(/\s+/).reduce<string[]>((done, word) => {
    const last = done.at(-1)
    const set = prose(word)
    const fits = last !== undefined && last.length + set.length < 79
    return fits ? [...done.slice(0, -1), `${last} ${set}`] : [...done, set]
  }, [])
  return lines.map((line) => line.replace(/^(?=[.'])/, "\\&")).join("\n")
}

/** Characters that roff would change, by their names in groff_char(7). */
const NAMED: Record<string, string> = { "\\": "\\e", "~": "\\(ti", "^": "\\(ha", "`": "\\(ga", "'": "\\(aq" }

function escaped(text: string, named: Record<string, string>): string {
  return [...text]
    .map((character) => {
      const code = character.codePointAt(0)!
      return (
        named[character] ??
        (code < 127 ? character : `\\[u${code.toString(16).toUpperCase().padStart(4, "0")}]`)
      )
    })
    .join("")
}

/** Text as it is typed: every hyphen is a minus. */
const literal = (text: string): string => escaped(text, { ...NAMED, "-": "\\-" })

/** Running text, in which only the words that begin with a hyphen are options. */
const prose = (text: string): string =>
  escaped(text, NAMED).replace(
    /(^|[\s(;])(-[\w-]+)/g,
    (_, before: string, word: string) => before + word.replaceAll("-", "\\-"),
  )

/** A request with its arguments, quoted where that is needed. */
function macro(name: string, ...values: string[]): string {
  return `.${[name, ...values.map((value) => (value.includes(" ") ? `"${value}"` : value))].join(" ")}`
}

if (import.meta.main) {
  const { SOURCE_DATE_EPOCH } = process.env
  const now = SOURCE_DATE_EPOCH ? new Date(Number(SOURCE_DATE_EPOCH) * 1000) : new Date()
  process.stdout.write(manPage(USAGE, now.toISOString().slice(0, 10)))
}

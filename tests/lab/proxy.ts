#!/usr/bin/env bun
/**
 * A slow network: a TCP relay on 127.0.0.1 that delivers every chunk DELAY milliseconds late, in each direction.
 * Nothing else is limited.
 *
 *     bun tests/lab/proxy.ts LISTEN TARGET DELAY
 *
 * SIGUSR1 cuts every connection (both ends see it closed). SIGUSR2 freezes the network, and thaws it the next
 * time: meanwhile nothing arrives, no end either, as if a cable were unplugged.
 */

import { connect, createServer, type Socket } from "node:net"

type Cargo = Buffer | "end" | "cut"
type Chunk = { due: number; data: Cargo }

/** More waiting bytes than this stop the reading until some are delivered. */
const HIGH_WATER = 64 << 20

let frozen = false
const lanes = new Set<Lane>()

/** One direction of one connection: what came in, and when it may go out. */
class Lane {
  private queue: Chunk[] = []
  private waiting = 0
  private timer: ReturnType<typeof setTimeout> | undefined

  constructor(
    private from: Socket,
    private to: Socket,
    private delay: number,
  ) {
    lanes.add(this)
    from.on("data", (data: Buffer) => this.push(data))
    from.on("end", () => this.push("end"))
    from.on("error", () => undefined) // "close" follows
    from.on("close", (failed: boolean) => (failed ? this.push("cut") : undefined))
    to.on("close", () => lanes.delete(this))
    to.on("drain", () => this.deliver())
  }

  private push(data: Cargo): void {
    this.queue.push({ due: performance.now() + this.delay, data })
    this.waiting += data.length
    if (this.waiting > HIGH_WATER) this.from.pause()
    this.deliver()
  }

  /** Sends what is due and sets the clock for the rest. */
  deliver(): void {
    clearTimeout(this.timer)
    while (!frozen && this.queue.length > 0 && !this.to.writableNeedDrain) {
      const next = this.queue[0]!
      const early = next.due - performance.now()
      if (early > 0) {
        this.timer = setTimeout(() => this.deliver(), early)
        return
      }
      this.queue.shift()
      this.waiting -= next.data.length
      this.send(next.data)
    }
    if (this.waiting <= HIGH_WATER) this.from.resume()
  }

  private send(data: Cargo): void {
    if (data === "cut") this.cut()
    else if (data === "end") this.to.end()
    else this.to.write(data)
  }

  cut(): void {
    clearTimeout(this.timer)
    this.queue = []
    lanes.delete(this)
    this.from.destroy()
    this.to.destroy()
  }
}

/** Listens on a port of 127.0.0.1 and relays to another one. */
export function startProxy(listen: number, target: number, delay: number): void {
  createServer({ allowHalfOpen: true, noDelay: true }, (near) => {
    const far = connect({ port: target, host: "127.0.0.1", allowHalfOpen: true, noDelay: true })
    new Lane(near, far, delay)
    new Lane(far, near, delay)
  }).listen(listen, "127.0.0.1")
}

function cutAll(): void {
  for (const lane of [...lanes]) lane.cut()
}

function toggleFreeze(): void {
  frozen = !frozen
  for (const lane of lanes) lane.deliver()
}

if (import.meta.main) {
  const [listen, target, delay] = process.argv.slice(2).map(Number)
  if (listen === undefined || target === undefined || delay === undefined) {
    console.error("usage: proxy.ts LISTEN TARGET DELAY")
    process.exit(2)
  }
  process.on("SIGUSR1", cutAll)
  process.on("SIGUSR2", toggleFreeze)
  startProxy(listen, target, delay)
}

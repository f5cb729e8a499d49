/**
 * Sends Puts and Removes: a bounded queue, many operations in one Batch, one Batch at a time. It also finds out that a failing
 * store is back, so that no handshake has to.
 */
import type { Breaker } from "./breaker.js";
import type { Logger } from "./files.js";
import type { Recorder } from "./stats.js";
import { CallError, duration, type Store } from "./store.js";
import type { BatchOperation } from "./v1/resumed/v1/session_store.js";

const BATCH_OPERATIONS = 256;
const BATCH_MILLISECONDS = 1000;
const QUEUE_BYTES = 16 << 20;
/** An entry's own memory, roughly, beside its value. */
const OVERHEAD = 256;
/**
 * How long what nobody waits for waits for company: a Batch costs about what a resumption does, whatever it carries, so a busy
 * frontend shares it among its handshakes.
 */
const LINGER_MILLISECONDS = 3;
/** After how many milliseconds a Batch that failed is sent again. */
const RETRY_MILLISECONDS = 50;
const PROBE_KEY = Buffer.from("resumed/v1 probe");

/** A Put, or a Remove where `value` is undefined. */
export interface Outgoing {
  key: Buffer;
  value?: Buffer;
  /** When the session's life ends, in Unix seconds: waiting in the queue does not prolong it. */
  notAfter?: number;
  /** When it was negotiated, in Unix seconds: waiting in the queue does not bring it past a purge. */
  issued?: number;
  /** For a Remove, why. */
  reason?: "application" | "fatal-error";
}

interface Entry extends Outgoing {
  finished: () => void;
}

export class Sender {
  readonly #store: Store;
  readonly #deadline: number;
  readonly #breaker: Breaker;
  readonly #recorder: Recorder;
  readonly #logger: Logger;
  readonly #clock: () => number;
  #queue: Entry[] = [];
  /** The keys of the Removes in the queue. */
  readonly #removing = new Set<string>();
  #bytes = 0;
  #sending = false;
  #closed = false;
  #timer: NodeJS.Timeout | undefined;

  constructor(parts: {
    store: Store;
    deadline: number;
    breaker: Breaker;
    recorder: Recorder;
    logger: Logger;
    clock: () => number;
  }) {
    this.#store = parts.store;
    this.#deadline = parts.deadline;
    this.#breaker = parts.breaker;
    this.#recorder = parts.recorder;
    this.#logger = parts.logger;
    this.#clock = parts.clock;
  }

  /** Queues `outgoing`, or drops it if there is no room; resolves when it was sent or given up. Never rejects. */
  submit(outgoing: Outgoing, urgent: boolean): Promise<void> {
    return new Promise((finished) => {
      if (this.#closed || this.#bytes + size(outgoing) > QUEUE_BYTES) {
        this.#count(outgoing, "dropped");
        finished();
        return;
      }
      this.#queue.push({ ...outgoing, finished });
      if (!outgoing.value) this.#removing.add(nameOf(outgoing.key));
      this.#bytes += size(outgoing);
      this.#schedule(urgent ? 0 : LINGER_MILLISECONDS);
    });
  }

  /** Whether the Remove of a session is in the queue: for this frontend it is removed already. */
  isRemoving(key: Buffer): boolean {
    return this.#removing.has(nameOf(key));
  }

  /** Resolves when all that was submitted so far was sent, to true, or when `timeout` milliseconds have passed, to false. */
  async flush(timeout: number): Promise<boolean> {
    const last = this.#queue.at(-1);
    if (!last) return true;
    this.#schedule(0);
    const sent = new Promise<true>((resolve) => {
      const { finished } = last;
      last.finished = () => {
        finished();
        resolve(true);
      };
    });
    return within(sent, timeout, false);
  }

  /**
   * Notes that a call failed which began then (performance.now()); when the store keeps failing, begins to try whether it is back.
   * Returns for how many milliseconds to send no other Batch.
   */
  failed(error: unknown, began: number): number {
    if (error instanceof CallError && error.reason === "limited") return this.#limited(began);
    const stoodStill = error instanceof CallError && error.stoodStill; // this process did: it says nothing of the store
    if (!this.#closed && !stoodStill && this.#breaker.failed(began)) {
      this.#logger.warn(`resumed: the store keeps failing, resumption rests: ${String(error)}`);
      clearTimeout(this.#timer); // of a Batch
      this.#timer = undefined;
      this.#schedule(0);
    }
    return RETRY_MILLISECONDS;
  }

  #limited(began: number): number {
    this.#answers(this.#breaker.reached()); // it is no outage
    return this.#breaker.limited(began);
  }

  succeeded(): void {
    this.#answers(this.#breaker.succeeded());
  }

  #answers(again: boolean): void {
    if (again) this.#logger.info("resumed: the store answers again");
  }

  /** Accepts nothing more, sends what is not sent yet, for up to `timeout` milliseconds, and stops. */
  async close(timeout: number): Promise<void> {
    if (this.#closed) return;
    if (this.#breaker.closed) await this.flush(timeout);
    this.#closed = true;
    clearTimeout(this.#timer);
    for (const entry of this.#queue) {
      this.#count(entry, "dropped");
      entry.finished();
    }
    this.#queue = [];
  }

  /** Has #run called after `delay` milliseconds, or at the end of this turn of the event loop. */
  #schedule(delay: number): void {
    if (this.#sending || this.#closed) return; // #run schedules what comes next
    if (!this.#breaker.closed) {
      this.#timer ??= this.#later(this.#breaker.nextPause()).unref();
    } else if (delay === 0) {
      clearTimeout(this.#timer);
      this.#timer = undefined;
      this.#sending = true;
      setImmediate(() => void this.#run());
    } else {
      this.#timer ??= this.#later(delay);
    }
  }

  #later(delay: number): NodeJS.Timeout {
    return setTimeout(() => {
      this.#timer = undefined;
      this.#sending = true;
      void this.#run();
    }, delay);
  }

  async #run(): Promise<void> {
    let pause = 0;
    if (!this.#breaker.closed) await this.#probe();
    else pause = await this.#send();
    this.#sending = false;
    if (this.#queue.length > 0 || !this.#breaker.closed) this.#schedule(pause);
  }

  /** Sends the first of the queue, and resolves to the milliseconds for which to send no more. */
  async #send(): Promise<number> {
    const batch = this.#queue.slice(0, BATCH_OPERATIONS);
    const began = performance.now();
    const now = this.#clock();
    const operations = batch.map((outgoing) => this.#operation(outgoing, now));
    const living = operations.filter((operation) => operation !== undefined);
    try {
      const results = living.length > 0 ? await this.#store.batch(living, BATCH_MILLISECONDS) : [];
      if (results.length !== living.length) throw new Error("the store answered another number of operations");
      // A store that answers, but too late for a handshake, is no help, and a Batch must not hide that.
      if (living.length > 0 && performance.now() - began <= this.#deadline) this.succeeded();
      for (const [index, entry] of batch.entries()) {
        const result = operations[index] && results.shift()?.result;
        this.#count(entry, !result ? "expired" : result.$case === "error" ? "refused" : "stored");
      }
    } catch (error) {
      // Everything stays in the queue, in its order: ids are write-once, so sending twice does no harm.
      return this.failed(error, began);
    }
    this.#queue.splice(0, batch.length);
    for (const entry of batch) {
      this.#bytes -= size(entry);
      if (!entry.value) this.#removing.delete(nameOf(entry.key));
      entry.finished();
    }
    return 0;
  }

  #operation({ key, value, notAfter = 0, issued = 0 }: Outgoing, now: number): BatchOperation | undefined {
    const { namespace } = this.#store;
    if (!value) return { operation: { $case: "remove", remove: { namespace, key } } };
    if (notAfter <= now) return undefined;
    const [ttl, issueTime] = [duration(notAfter - now), duration(issued)];
    return { operation: { $case: "put", put: { namespace, key, value, ttl, issueTime } } };
  }

  async #probe(): Promise<void> {
    const began = performance.now();
    try {
      // With the deadline of a handshake: a store that answers, but too late for one, is no help.
      await this.#store.get(PROBE_KEY, this.#deadline);
      this.succeeded();
    } catch (error) {
      if (error instanceof CallError && error.reason === "limited") this.#limited(began);
    }
  }

  #count(outgoing: Outgoing, outcome: string): void {
    if (outgoing.value) this.#recorder.count("puts", outcome);
    else this.#recorder.count("removals", outcome === "stored" ? (outgoing.reason ?? "application") : outcome);
  }
}

function nameOf(key: Buffer): string {
  return key.toString("latin1");
}

function size({ value }: Outgoing): number {
  return OVERHEAD + (value?.length ?? 0);
}

/** Resolves as `promise` does, or to `otherwise` when `milliseconds` have passed. */
export async function within<Value>(promise: Promise<Value>, milliseconds: number, otherwise: Value): Promise<Value> {
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<Value>((resolve) => {
    timer = setTimeout(resolve, milliseconds, otherwise);
  });
  try {
    return await Promise.race([promise, late]);
  } finally {
    clearTimeout(timer);
  }
}

/** Follows the purges of a namespace. A stream that ends begins again a second later, and then repeats the last purge. */
import type { ClientReadableStream } from "@grpc/grpc-js";

import type { Logger } from "./files.js";
import type { Store } from "./store.js";
import type { Timestamp } from "./v1/google/protobuf/timestamp.js";
import type { NamespacePurged, WatchResponse } from "./v1/resumed/v1/session_store.js";

const RETRY_MS = 1000;
/** Streams that fail in a row before that is logged: one that ends is none, as connections have a maximum age. */
const FAILURES_TO_LOG = 3;

export class PurgeWatch {
  readonly #store: Store;
  readonly #logger: Logger;
  readonly #purged: (before: number | undefined) => void;
  #stream: ClientReadableStream<WatchResponse> | undefined;
  #timer: NodeJS.Timeout | undefined;
  #failures = 0;

  /** @param purged Gets the time before which sessions were purged, in Unix seconds; undefined for all. */
  constructor(store: Store, logger: Logger, purged: (before: number | undefined) => void) {
    this.#store = store;
    this.#logger = logger;
    this.#purged = purged;
  }

  /** Follows, if it does not already. Until end() the stream keeps the process alive. */
  begin(): void {
    if (this.#stream) return;
    clearTimeout(this.#timer);
    const stream = this.#store.watchRemovals();
    this.#stream = stream;
    let live = false;
    stream.on("data", (response: WatchResponse) => {
      this.#failures = 0;
      live ||= response.live;
      for (const { event } of response.events) if (event?.$case === "purged") this.#purged(beforeOf(event.purged, live));
    });
    stream.on("error", (error) => {
      if (this.#stream !== stream || ++this.#failures !== FAILURES_TO_LOG) return;
      this.#logger.warn(`resumed: namespace ${this.#store.namespace}: purges are not followed: ${error.message}`);
    });
    stream.once("status", () => {
      if (this.#stream !== stream) return;
      this.#stream = undefined;
      this.#timer = setTimeout(() => {
        this.begin();
      }, RETRY_MS).unref();
    });
  }

  end(): void {
    clearTimeout(this.#timer);
    const stream = this.#stream;
    this.#stream = undefined;
    stream?.cancel();
  }
}

function beforeOf({ issuedBeforeTime, purgeTime }: NamespacePurged, live: boolean): number | undefined {
  if (issuedBeforeTime) return secondsOf(issuedBeforeTime);
  // One of the past does not end the secrets that were made since.
  return live || !purgeTime ? undefined : secondsOf(purgeTime);
}

function secondsOf({ seconds, nanos }: Timestamp): number {
  return seconds + nanos / 1e9;
}

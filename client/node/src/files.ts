/** Files that are read again when they change: keyrings, credentials. */
import { statSync } from "node:fs";

import { ResumedError } from "./errors.js";

const CHECK_MS = 1000;

/** Gets log lines; `console` is one. */
export interface Logger {
  info(message: string): void;
  warn(message: string): void;
  error(message: string): void;
}

/** The state of files that are read again when they change. */
export interface Reload {
  /** Whether the present content is in use. */
  successful: boolean;
  /** The time in Unix seconds when content that is in use was last read. */
  time: number;
}

/**
 * Files that belong together. Changed files are read once they look the same twice in a row, or were last written a second ago, so
 * that no read gets half of a change. Files that cannot be used are reported once, and the content that was read before stays in use.
 */
export class Files {
  readonly paths: readonly string[];
  readonly #name: string;
  readonly #logger: Logger;
  #seen: string;
  #taken: string;
  #takenAt = Date.now() / 1000;
  #complaint = "";
  #nextCheck = performance.now() + CHECK_MS;

  /**
   * Notes the present state of the files; read them after that.
   *
   * @param name The name of the files in the log.
   * @throws {ResumedError} There is none.
   */
  constructor(name: string, paths: readonly string[], logger: Logger) {
    this.paths = paths;
    this.#name = name;
    this.#logger = logger;
    this.#seen = this.#taken = this.#look();
  }

  get lastReload(): Reload {
    return { successful: !this.#complaint, time: this.#takenAt };
  }

  /** Looks once a second at most, and calls `read` when the files have changed and settled; it returns what goes to the log. */
  follow(read: () => string): void {
    if (performance.now() < this.#nextCheck) return;
    this.#nextCheck = performance.now() + CHECK_MS;
    try {
      const [before, seen] = [this.#seen, this.#look()];
      this.#seen = seen;
      if (seen !== this.#taken) {
        if (seen !== before && this.paths.some(isRecent)) return;
        const news = read();
        this.#taken = seen;
        this.#takenAt = Date.now() / 1000;
        this.#logger.info(`resumed: ${this.#name} read again${news && `: ${news}`}`);
      }
      this.#complaint = "";
    } catch (error) {
      const complaint = String(error);
      if (complaint !== this.#complaint) {
        // once, not every second
        this.#logger.error(`resumed: ${this.#name} not read again, what was read before stays: ${complaint}`);
      }
      this.#complaint = complaint;
    }
  }

  #look(): string {
    return this.paths.map((path) => this.#versionOf(path)).join();
  }

  #versionOf(path: string): string {
    try {
      const { ino, size, mtimeNs } = statSync(path, { bigint: true });
      return [ino, size, mtimeNs].join(" ");
    } catch (error) {
      throw new ResumedError(`${this.#name} ${path}: ${codeOf(error)}`);
    }
  }
}

function isRecent(path: string): boolean {
  return Date.now() - statSync(path).mtimeMs < CHECK_MS;
}

/** What went wrong with a file, in a word. */
export function codeOf(error: unknown): string {
  return (error as NodeJS.ErrnoException).code ?? String(error);
}

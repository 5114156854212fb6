/* Browsers refuse web workers to pages that are opened from the file system, and the search runs in one. There, a worker's script is
   run in a hidden frame instead, with the part of a worker's interface that the search uses: postMessage, onmessage, importScripts. */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const home = new URL(url, location)
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.documentElement.appendChild(frame)
      const inner = frame.contentWindow
      const load = (address) => new Promise((done, failed) => {
        const script = inner.document.createElement("script")
        script.src = new URL(address, home)
        script.onload = () => done()
        script.onerror = failed
        inner.document.body.appendChild(script)
      })
      inner.document.open()
      inner.document.write("<!doctype html><title>search</title><body>")
      inner.document.close()
      inner.importScripts = (...addresses) => addresses.reduce((before, next) => before.then(() => load(next)), Promise.resolve())
      inner.postMessage = (data) => {  // from the script to the page
        const event = new MessageEvent("message", { data })
        this.dispatchEvent(event)
        this.onmessage?.(event)
      }
      this.inner = inner
      this.ready = load(home)
    }
    postMessage(data) {  // from the page to the script
      this.ready.then(() => this.inner.dispatchEvent(new MessageEvent("message", { data })))
    }
    terminate() {
      this.inner.frameElement.remove()
    }
  }
}
